"""Append-only results: killed, continued, merged; loaded by pycocotools."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO

from sam3_jax.inference import merge as merging
from sam3_jax.inference import records
from sam3_jax.inference.files import UsageError
from sam3_jax.inference.merge import merge, read_done
from sam3_jax.inference.placed import Placed, annotation
from sam3_jax.inference.records import RecordWriter, error_record, ok_record, part_path

RUN = {"checkpoint": "c", "phrases": ["cat", "dog"], "nms": {"kind": "iou", "limit": 0.5}}


def disc(radius: int) -> np.ndarray:
    y, x = np.mgrid[:40, :50]
    return (x - 20) ** 2 + (y - 15) ** 2 < radius**2


def record(key: str, index: int, *phrases: str) -> dict:
    """A good record with one instance of each phrase."""
    box = np.asarray([-3.0, 4, 60, 30], np.float32)
    found = [(phrase, Placed(disc(8 + i), 0, 0, box, 0.9)) for i, phrase in enumerate(phrases)]
    return ok_record(
        key,
        f"{key}.jpg",
        index=index,
        size=(40, 50),
        seconds=0.12345,
        phrases=phrases,
        annotations=[annotation(phrase, one, (40, 50)) for phrase, one in found],
        outputs=[f"{key}_overlay.png"],
    )


def write(folder: Path, *items: dict, process: int = 0, processes: int = 1) -> Path:
    path = part_path(folder, process, processes)
    with RecordWriter(path, RUN) as writer:
        for item in items:
            writer.write(item)
    return path


def test_what_is_written_is_merged_and_loads(tmp_path):
    write(tmp_path, record("c", 2, "dog", "bird"), processes=2)
    bad = error_record("b", "b.jpg", "b.jpg: the file is empty", index=1)
    write(tmp_path, bad, record("a", 0, "cat"), process=1, processes=2)
    assert read_done(tmp_path) == {"a", "c"}
    path = merge(tmp_path)
    assert path == tmp_path / "results.json"
    data = json.loads(path.read_text())
    assert data["schema_version"] == 1
    assert data["info"] == RUN
    assert [image["file_name"] for image in data["images"]] == ["a.jpg", "b.jpg", "c.jpg"]
    assert [image["status"] for image in data["images"]] == ["ok", "error", "ok"]
    assert [image.get("error") for image in data["images"]] == [None, bad["error"], None]
    assert [c["name"] for c in data["categories"]] == ["cat", "dog", "bird"]
    coco = COCO(str(path))
    assert sorted(coco.anns) == [1, 2, 3]
    assert [(a["image_id"], a["category_id"]) for a in coco.anns.values()] == [
        (1, 1),
        (3, 2),
        (3, 3),
    ]
    np.testing.assert_array_equal(coco.annToMask(coco.anns[3]), disc(9))
    first = coco.anns[1]
    assert first["bbox"] == [0, 4, 50, 26]  # clipped to the picture
    assert first["area"] == disc(8).sum()
    assert first["score"] == 0.9
    assert first["iscrowd"] == 0
    assert len(coco.loadRes(data["annotations"]).anns) == 3


def test_the_order_of_processes_does_not_show(tmp_path):
    items = [record(f"k{i}", i, "cat", f"p{i}") for i in range(7)]
    merged = []
    for processes in (1, 3):
        folder = tmp_path / str(processes)
        folder.mkdir()
        for process in range(processes):
            write(folder, *items[process::processes][::-1], process=process, processes=processes)
        merged.append(merge(folder).read_bytes())
    assert merged[0] == merged[1]


@pytest.mark.parametrize("torn", [b'{"key": "b", "sta', b"\0" * 200_000])
def test_a_torn_last_line_is_cut_off_and_done_again(tmp_path, torn):
    path = write(tmp_path, record("a", 0, "cat"))
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert read_done(tmp_path) == {"a"}
    assert len(json.loads(merge(tmp_path).read_text())["images"]) == 1
    write(tmp_path, record("b", 1, "cat"))
    assert path.read_bytes().startswith(whole + b'{"key": "b"')
    assert read_done(tmp_path) == {"a", "b"}


def test_a_torn_first_line_starts_again(tmp_path):
    path = part_path(tmp_path, 0, 1)
    path.write_bytes(b'{"schema_ver')
    with pytest.raises(UsageError, match="no results in"):
        merge(tmp_path)
    write(tmp_path, record("a", 0))
    assert json.loads(path.read_bytes().splitlines()[0])["run"] == RUN


def test_a_killed_process_leaves_what_it_wrote(tmp_path):
    """SIGKILL in the middle of writing: every line that came back from write is there."""
    code = """
import sys
from pathlib import Path
from sam3_jax.inference.records import RecordWriter, error_record, part_path
writer = RecordWriter(part_path(Path(sys.argv[1]), 0, 1), {})
for i in range(10**9):
    record = error_record(str(i), "f", "x" * 20000, index=i)
    writer.write({**record, "status": "ok"})
    print(i, flush=True)
"""
    root = Path(__file__).resolve().parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=root
    )
    for _ in range(30):
        process.stdout.readline()
    process.kill()
    announced = 30 + len(process.stdout.read().splitlines())
    process.wait()
    process.stdout.close()
    done = read_done(tmp_path)
    assert {str(i) for i in range(announced - 1)} <= done
    with RecordWriter(part_path(tmp_path, 0, 1), {}) as writer:
        writer.write({**error_record("new", "f", "", index=0), "status": "ok"})
    assert read_done(tmp_path) == done | {"new"}


def test_which_record_of_a_key_counts(tmp_path):
    failed = error_record("a", "a.jpg", "out of memory", index=0)
    write(tmp_path, failed)
    assert read_done(tmp_path) == set()
    write(tmp_path, record("a", 0, "cat"), process=0, processes=2)  # another number of processes
    assert read_done(tmp_path) == {"a"}
    write(tmp_path, failed, process=1, processes=2)  # a later part: the good one stays
    assert [i["status"] for i in json.loads(merge(tmp_path).read_text())["images"]] == ["ok"]
    write(tmp_path, failed, process=0, processes=2)  # the same part: the last one counts
    assert read_done(tmp_path) == set()


def test_damage_in_the_middle_costs_that_picture_only(tmp_path):
    path = write(tmp_path, *(record(key, i, "cat") for i, key in enumerate("abc")))
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = b"\0" * (len(lines[2]) - 1) + b"\n"
    path.write_bytes(b"".join(lines))
    assert read_done(tmp_path) == {"a", "c"}
    assert len(COCO(str(merge(tmp_path))).imgs) == 2


def test_other_settings_are_refused_and_named(tmp_path):
    path = write(tmp_path, record("a", 0))
    before = path.read_bytes()
    changed = {**RUN, "nms": {"kind": "iou", "limit": 0.7}, "dtype": "float32"}
    for part in (path, part_path(tmp_path, 1, 2)):
        with pytest.raises(UsageError) as caught:
            RecordWriter(part, changed)
        message = str(caught.value)
        assert "nms.limit was 0.5, is 0.7" in message
        assert 'dtype was None, is "float32"' in message
        assert "checkpoint" not in message
        assert "--overwrite" in message
    assert path.read_bytes() == before
    assert not part_path(tmp_path, 1, 2).exists()
    RecordWriter(path, {**RUN, "phrases": ("cat", "dog")}).close()  # a tuple is a list
    records.discard(tmp_path)
    RecordWriter(path, changed).close()


@pytest.mark.parametrize("line", [b"hello\n", b"[1]\n", b'{"schema_version": 9, "run": {}}\n'])
def test_files_of_others_are_left_alone(tmp_path, line):
    path = part_path(tmp_path, 0, 1)
    path.write_bytes(line)
    for call in (lambda: RecordWriter(path, RUN), lambda: merge(tmp_path)):
        with pytest.raises(UsageError, match="results-00000-of-00001"):
            call()
    assert path.read_bytes() == line


def test_a_full_disk_names_the_file_and_leaves_no_half_line(tmp_path, monkeypatch):
    path = part_path(tmp_path, 0, 1)
    write_, room = os.write, [30]

    def full(file: int, data: memoryview) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write_(file, data[: room[0]])
        room[0] -= written
        return written

    with RecordWriter(path, RUN) as writer:
        writer.write(record("a", 0, "cat"))
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(OSError, match="No space left.*results-00000-of-00001") as caught:
                writer.write(record("b", 1, "cat"))
        assert caught.value.errno == errno.ENOSPC
        assert path.read_bytes() == before
        writer.write(record("b", 1, "cat"))
    assert read_done(tmp_path) == {"a", "b"}


def test_results_that_cannot_be_replaced_stay(tmp_path, monkeypatch):
    write(tmp_path, record("a", 0, "cat"))
    before = merge(tmp_path).read_bytes()
    write(tmp_path, record("b", 1, "cat"))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(merging, "_write_list", full)
    with pytest.raises(OSError, match=r"results\.json"):
        merge(tmp_path)
    assert (tmp_path / "results.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "results-00000-of-00001.jsonl",
        "results.json",
    ]
    with pytest.raises(FileNotFoundError):
        RecordWriter(tmp_path / "none" / "results-00000-of-00001.jsonl", RUN)


def test_numbers_that_json_lacks_are_refused(tmp_path):
    with RecordWriter(part_path(tmp_path, 0, 1), RUN) as writer:
        with pytest.raises(ValueError, match="JSON"):
            writer.write({**record("a", 0), "seconds": float("nan")})
        writer.write(record("b", 0))
    assert read_done(tmp_path) == {"b"}


def test_merging_needs_little_memory(tmp_path):
    """20 MB of masks in 100 pictures: only a few lines of them at a time."""
    base = record("k", 0, "cat")
    counts = "0" * 200_000
    with RecordWriter(part_path(tmp_path, 0, 1), RUN) as writer:
        for i in range(100):
            item = {**base["annotations"][0], "segmentation": {"size": [40, 50], "counts": counts}}
            writer.write({**base, "key": f"k{i}", "annotations": [item]})
    tracemalloc.start()
    merge(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "results.json").stat().st_size > 20e6
    # A line of 0.2 MB is there as bytes, text, JSON and again: about ten of them, not a hundred.
    assert peak < 4e6
