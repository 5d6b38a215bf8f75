"""Files of videos: YouTube-VIS, SA-Co VEval, results in both forms; and ``evaluate.py`` on them."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sam3_jax.data.records import AnnotationError
from sam3_jax.evaluation import cli
from sam3_jax.evaluation.video.annotations import load_video_annotations, video_layout
from sam3_jax.evaluation.video.measure import measure_videos
from sam3_jax.evaluation.video.predictions import load_video_predictions
from test_video_metrics_tracks import UPSTREAM
from video_cases import annotation, encode, random_videos, result, strip, write

ROOT = Path(__file__).resolve().parents[1]
A, B = strip(0, 6), strip(10, 6)
FRAMES = 2


def small() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Two videos of one row: a cat in both, a dog in the first; two cats found, one of them."""
    videos = [
        {"id": n, "file_names": [f"{name}/{t}.jpg" for t in range(FRAMES)], "height": 1}
        | {"width": 20, "length": FRAMES}
        for n, name in ((1, "park"), (2, "home"))
    ]
    annotations = [
        annotation(1, 1, 1, [A, A]),
        annotation(2, 2, 1, [B, None]),
        annotation(3, 1, 2, [B, B]),
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "cup"}]
    data = {"videos": videos, "annotations": annotations, "categories": categories}
    return data, [result(1, 1, [A, A], 0.9), result(2, 3, [B, B], 0.8)]


def figures(gt: Path, found: Path) -> dict[str, float]:
    dataset = load_video_annotations(gt)
    return measure_videos(dataset, load_video_predictions(found, dataset)).metrics()


def test_pairs_of_both_layouts(tmp_path):
    data, results = small()
    gt, _ = write(tmp_path, data, results)
    dataset = load_video_annotations(gt)
    assert dataset.layout == "ytvis"
    assert list(dataset.pairs) == [(v, c) for v in (1, 2) for c in (1, 2, 3)]
    assert list(load_video_annotations(gt, negatives=False).pairs) == [(1, 1), (2, 1), (1, 2)]
    assert [video.name for video in dataset.videos.values()] == ["park", "home"]
    # SA-Co names its pairs; one that is annotated counts even if the list lacks it.
    data["video_np_pairs"] = [
        {"id": 1, "video_id": 1, "category_id": 1, "num_masklets": 1},
        {"id": 2, "video_id": "2", "category_id": 3, "num_masklets": 0},
    ]
    gt, _ = write(tmp_path, data, results)
    dataset = load_video_annotations(gt)
    assert dataset.layout == "saco"
    assert list(dataset.pairs) == [(1, 1), (2, 3), (2, 1), (1, 2)]
    assert [len(pair.targets) for pair in dataset.pairs.values()] == [1, 0, 1, 1]


def test_masks_come_in_several_forms(tmp_path):
    data, results = small()
    gt, found = write(tmp_path, data, results)
    expected = figures(gt, found)
    for entry in data["annotations"]:
        entry["video_id"] = str(entry["video_id"])
        entry["segmentations"] = [uncompressed(mask) for mask in entry["segmentations"]]
    empty = encode(np.zeros((1, 20), bool))
    data["annotations"][1]["segmentations"][1] = empty
    for entry in results:
        del entry["bboxes"], entry["areas"]
    assert figures(*write(tmp_path, data, results)) == expected
    crowd = annotation(4, 2, 2, [A, A]) | {"iscrowd": 1}
    data["annotations"].append(crowd)
    assert figures(*write(tmp_path, data, results)) == expected  # nothing has to be found there


def uncompressed(rle: dict[str, Any] | None) -> dict[str, Any] | None:
    if rle is None:
        return None
    row = coco_mask.decode(rle).T.ravel()
    edges = np.flatnonzero(np.diff(row, prepend=0, append=1 - row[-1]))
    return {"size": rle["size"], "counts": np.diff(edges, prepend=0).tolist()}


def test_damage_is_reported_and_its_pair_left_out(tmp_path):
    data, results = small()
    good = annotation(9, 1, 1, [A, A])
    data["annotations"] += [
        good | {"id": 4, "video_id": 7},
        good | {"id": 5, "segmentations": good["segmentations"][:1]},
        good | {"id": 6, "category_id": 2, "segmentations": [None, None]},
        good | {"id": 7, "video_id": 2, "segmentations": [{"size": [2, 20], "counts": "0"}, None]},
        "nonsense",
    ]
    results += [
        result(1, 3, [A, A], 0.9) | {"segmentations": [None]},
        result(1, 3, [A, A], 0.9) | {"score": None},
        result(2, 2, [None, None], 0.9),  # a wrong prediction, not damage
    ]
    gt, found = write(tmp_path, data, results)
    with pytest.raises(AnnotationError, match="5 of 10 entries cannot be used"):
        load_video_annotations(gt)
    dataset = load_video_annotations(gt, max_bad=0.5)
    assert dataset.problems.found == {
        "of an unknown video or category": ["annotation 4"],
        "segmentations of another number of frames than the video": ["annotation 5"],
        "a track that is in no frame": ["annotation 6"],
        "mask of another size than the image": ["annotation 7"],
        "is not an object with fields": ["annotation 7"],
    }
    # Of a pair that lost a track nobody can say what is missing.
    assert list(dataset.pairs) == [(1, 3), (2, 2), (2, 3)]
    with pytest.raises(AnnotationError, match="2 of 5 entries"):
        load_video_predictions(found, dataset)
    predictions = load_video_predictions(found, dataset, max_bad=0.5)
    assert predictions.problems.found == {
        "segmentations of another number of frames than the video": ["track 2"],
        "no score": ["track 3"],
    }
    assert [track.masks for track in predictions.found[2, 2]] == [(None, None)]
    assert predictions.notes == ["1 tracks of pairs outside the ground truth were left out"]


def own_files(folder: Path) -> Path:
    """The same results, one file a video, by names and phrases."""
    for name, number, phrase, masks in (("park", 1, "cat", [A, A]), ("home", 2, "cup", [B, B])):
        entry = result(5, 8, masks, 0.9)
        del entry["score"]
        data = {
            "videos": [{"id": 5, "file_name": f"clips/{name}.mp4"}],
            "categories": [{"id": 8, "name": phrase}, {"id": 9, "name": "unicorn"}],
            "annotations": [entry | {"scores": [0.6, None, 1.0 - 0.1 * number]}],
        }
        (folder / name).mkdir(parents=True)
        (folder / name / "results.json").write_text(json.dumps(data))
    (folder / "settings.json").write_text("{}")
    return folder


def test_files_by_name_in_a_folder(tmp_path):
    data, results = small()
    gt, found = write(tmp_path, data, results)
    dataset = load_video_annotations(gt)
    predictions = load_video_predictions(own_files(tmp_path / "out"), dataset)
    assert {key: tracks[0].score for key, tracks in predictions.found.items()} == {
        (2, 3): pytest.approx(0.7),
        (1, 1): pytest.approx(0.75),
    }
    assert predictions.notes == [
        "4 of 6 pairs are not in the predictions (video or phrase): counted as nothing found"
    ]
    assert figures(gt, tmp_path / "out") == figures(gt, found)


def test_empty_predictions_and_other_videos(tmp_path):
    data, _ = small()
    gt, found = write(tmp_path, data, [])
    metrics = figures(gt, found)
    assert {metrics[name] for name in ("cgF1", "pHOTA", "HOTA", "TETA")} == {0}
    gt, found = write(tmp_path, data, [result(77, 1, [A, A], 0.9)])
    with pytest.raises(AnnotationError, match="none of its 1 tracks belongs to"):
        figures(gt, found)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AnnotationError, match="no JSON file of predicted tracks"):
        load_video_predictions(tmp_path / "empty", load_video_annotations(gt))


def test_what_is_a_video(tmp_path):
    files = {
        "videos.json": {"videos": [], "annotations": []},
        "pictures.json": {"images": [], "annotations": []},
        "phrase.json": {"images": [], "categories": [{"name": "videos"}, {"name": '"videos": ['}]},
        "both.json": {"images": [], "videos": []},
    }
    layouts = {}
    for name, data in files.items():
        (tmp_path / name).write_text(json.dumps(data, indent=1))
        layouts[name] = video_layout(tmp_path / name)
    assert layouts == dict.fromkeys(files) | {"videos.json": "tracks"}
    (tmp_path / "nothing.json").write_text("")
    assert video_layout(tmp_path / "nothing.json") is None
    assert video_layout(tmp_path / "missing.json") is None
    split = tmp_path / "dataset" / "valid"  # pictures as Roboflow exports them, one a split
    split.mkdir(parents=True)
    (split / "a.png").write_bytes(b"")
    assert video_layout(tmp_path / "dataset") == "davis"
    (split / "_annotations.coco.json").write_text("{}")
    assert video_layout(tmp_path / "dataset") is None


def run(*arguments: str | Path) -> int:
    return cli.main([str(argument) for argument in arguments])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_evaluate_end_to_end(tmp_path):
    """In a process of its own: figures of given predictions need no accelerator library."""
    gt, found = write(tmp_path, *random_videos())
    code = "import sys, runpy\ntry: runpy.run_path('evaluate.py', {}, '__main__')\n"
    code += "finally: print('jax' in sys.modules)"
    command = [sys.executable, "-c", code, "--gt", gt, "--predictions", found]
    out = tmp_path / "out"
    done = subprocess.run(
        [*command, "--output", out], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("False\n")
    assert (out / "metrics.md").read_text().strip() in done.stdout
    data = json.loads((out / "metrics.json").read_text())
    for name, value in UPSTREAM.items():
        assert data["metrics"][name] == pytest.approx(value, abs=1e-9)  # the constants' digits
    assert (data["layout"], data["videos"], data["pairs"]) == ("saco", 10, 50)
    pairs, videos, phrases = (rows(out / f"{name}.csv") for name in ("pairs", "videos", "phrases"))
    assert (len(pairs), len(videos), len(phrases)) == (50, 10, 5)
    for name in ("targets", "predicted"):
        sums = {sum(int(row[name]) for row in part) for part in (pairs, videos, phrases)}
        assert len(sums) == 1
    unseen = next(row for row in phrases if row["phrase"] == "unseen")
    assert (unseen["targets"], unseen["pmF1"], unseen["TETA"]) == ("0", "", "")
    assert all(row["video"].startswith("video_") for row in videos)


def test_threshold_and_negatives(tmp_path, capsys):
    data, results = small()
    gt, found = write(tmp_path, data, results)
    out = tmp_path / "out"
    command = ("--gt", gt, "--predictions", found, "--output", out)
    assert run(*command, "--threshold", "0.85") == 0
    assert json.loads((out / "metrics.json").read_text())["metrics"]["IL_precision"] > 0.99
    assert run(*command, "--negatives", "none") == 0
    data = json.loads((out / "metrics.json").read_text())
    assert (data["pairs"], data["metrics"]["cgF1"]) == (3, 0)
    assert "1 tracks of pairs outside the ground truth" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"annotations": None}, (), "has no list named annotations; the annotations of YouTube"),
        ({"categories": []}, (), "has no list named categories"),
        ({"videos": []}, (), "5 of"),
        ({}, ("--gt", "gt.json", "gt.json"), "evaluate annotations of videos one by one"),
        ({}, ("--predictions", "gt.json"), "its tracks have no score; is this a ground truth?"),
        ({}, ("--predictions", "none.json"), "none.json: cannot be read"),
        ({}, ("--predictions", "text.json"), "text.json: is neither a list of YouTube-VIS"),
        ({}, ("--output", "gt.json"), "cannot make the folder"),
    ],
)
def test_mistakes_are_explained(tmp_path, monkeypatch, capsys, change, arguments, message):
    data, results = small()
    data["video_np_pairs"] = [{"id": 1, "video_id": 1, "category_id": n} for n in (1, 2)]
    write(tmp_path, data | change, results)
    (tmp_path / "text.json").write_text('{"a": 1}')
    monkeypatch.chdir(tmp_path)
    command = {"--gt": ("gt.json",), "--predictions": ("results.json",), "--output": ("out",)}
    if arguments:
        command[arguments[0]] = arguments[1:]
    assert run(*(word for name, values in command.items() for word in (name, *values))) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
