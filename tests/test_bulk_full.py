"""Jobs as they happen: two hosts with two devices each; one is killed half-way and restarted."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import skimage.data
from pycocotools.coco import COCO

import tiny_predictor
from sam3_jax import checkpoint
from sam3_jax.inference.rle import decode_mask
from video_clips import write_clip

ROOT = Path(__file__).resolve().parents[1]
PICTURES = 60
PHRASES = ("--prompt", "cup", "cat", "--threshold", "0.03", "--batch-size", "4")
BROKEN = 7  # every so many pictures one that cannot be read


@pytest.fixture
def photos(tmp_path) -> Path:
    """Crops of photographs in several sizes and formats, some of them damaged."""
    folder = tmp_path / "photos"
    folder.mkdir()
    sources = [skimage.data.coffee(), skimage.data.chelsea(), skimage.data.astronaut()]
    for i in range(PICTURES):
        whole = sources[i % 3]
        height, width = 80 + 7 * (i % 11), 90 + 5 * (i % 13)
        suffix = (".jpg", ".png", ".webp")[i % 3]
        path = folder / f"{i:03d}{suffix}"
        PIL.Image.fromarray(whole[i : i + height, 2 * i : 2 * i + width]).save(path)
        if i % BROKEN == 0:
            path.write_bytes(path.read_bytes()[: 30 + 20 * i])
    return folder


class Job:
    """The command in processes of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        checkpoint.save(folder / "ckpt", tiny_predictor.params(), tiny_predictor.config())
        self.common = [sys.executable, "infer.py", "--checkpoint", str(folder / "ckpt")]
        self.common += ["--input", str(folder / "photos"), *arguments]
        flags = os.environ.get("XLA_FLAGS", "")
        two = "--xla_force_host_platform_device_count=2"
        flags = " ".join([f for f in flags.split() if "device_count" not in f] + [two])
        self.env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        self.env["SAM3_JAX_CACHE_DIR"] = str(folder / "cache")

    def start(self, output: Path, *more: str) -> subprocess.Popen:
        command = [*self.common, "--output", str(output), *more]
        return subprocess.Popen(
            command, cwd=ROOT, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def two(self, output: Path) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        joined = ("--distributed", "--coordinator", address, "--num-processes", "2")
        return [self.start(output, *joined, "--process-id", str(i)) for i in range(2)]


def records(output: Path) -> int:
    return sum(max(p.read_bytes().count(b"\n") - 1, 0) for p in output.glob("results-*.jsonl"))


@pytest.mark.slow
def test_killed_half_way_and_restarted(photos, tmp_path):
    job, output = Job(tmp_path, *PHRASES), tmp_path / "out"
    killed = job.two(output)
    end = time.monotonic() + 240
    while records(output) < PICTURES // 4 and time.monotonic() < end:
        time.sleep(0.05)
    for process in killed:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    before = records(output)
    assert PICTURES // 4 <= before < PICTURES, "the job was over, or never began"
    assert not (output / "results.json").exists()

    again = job.two(output)
    outputs = [process.communicate(timeout=400) for process in again]
    broken = len(range(0, PICTURES, BROKEN))
    assert [process.returncode for process in again] == [1, 1], outputs
    assert b"done before" in outputs[0][0] + outputs[1][0]

    coco = COCO(str(output / "results.json"))
    images = coco.dataset["images"]
    assert [Path(image["file_name"]).stem for image in images] == [
        f"{i:03d}" for i in range(PICTURES)
    ]
    assert sum(image["status"] == "error" for image in images) == broken
    for image in images:
        if image["status"] == "ok":
            drawn = PIL.Image.open(output / image["outputs"][0])
            assert drawn.size == (image["width"], image["height"])

    # One process on its own, in one go, finds the same.
    alone = job.start(tmp_path / "alone", "--no-overlay")
    alone.communicate(timeout=400)
    expected = json.loads((tmp_path / "alone" / "results.json").read_text())["annotations"]
    actual = coco.dataset["annotations"]
    assert len(actual) == len(expected) > PICTURES
    for a, b in zip(actual, expected, strict=True):
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
        assert a["score"] == pytest.approx(b["score"], abs=2e-5)  # other batches, other sums
        masks = [decode_mask(x["segmentation"]) for x in (a, b)]
        assert np.mean(masks[0] != masks[1]) < 2e-3


@pytest.mark.slow
def test_two_hosts_share_the_videos(tmp_path):
    """Of three videos one does two; together they leave what one process alone does."""
    (tmp_path / "photos").mkdir()
    for index in range(3):
        write_clip(tmp_path / "photos" / f"{index}.mp4", frames=4 + index)
    job = Job(tmp_path, "--point", "60,36", "--at", "1", "--no-overlay")
    hosts = job.two(tmp_path / "out")
    outputs = [process.communicate(timeout=500) for process in hosts]
    assert [process.returncode for process in hosts] == [0, 0], outputs
    assert b"2 of 2 videos" in outputs[0][0]
    assert b"1 of 1 videos" in outputs[1][0]
    alone = job.start(tmp_path / "alone")
    printed = alone.communicate(timeout=500)
    assert alone.returncode == 0, printed
    for index in range(3):
        name = f"{index}_tracks.json"
        shared, whole = (json.loads((tmp_path / f / name).read_text()) for f in ("out", "alone"))
        assert shared["annotations"] == whole["annotations"]
        assert len(shared["annotations"][0]["segmentations"]) == 4 + index
