"""The command ``evaluate.py``: figures end to end, files that it writes, failures."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import skimage.data
from pycocotools.coco import COCO

import tiny_predictor
from sam3_jax.evaluation import cli
from sam3_jax.inference.image import ImagePredictor
from sam3_jax.inference.postprocess import Detections

ROOT = Path(__file__).resolve().parents[1]
SIZE = (100, 150)
PHRASES = ("cat", "cup", "dog")


def rectangle(x: int, y: int, w: int, h: int) -> dict[str, Any]:
    return {
        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        "bbox": [x, y, w, h],
        "area": w * h,
    }


TARGETS = (  # image, category, box, crowd
    (1, 1, (10, 10, 20, 20), 0),
    (1, 1, (60, 10, 20, 20), 0),
    (1, 1, (100, 60, 40, 40), 1),
    (2, 3, (30, 30, 20, 20), 0),
)
FOUND = (  # image, category, box, score
    (1, 1, (10, 10, 20, 20), 0.9),
    (1, 1, (30, 70, 20, 20), 0.8),  # wrong
    (1, 1, (60, 10, 20, 20), 0.7),
    (1, 1, (110, 70, 20, 20), 0.1),  # in the crowd
    (2, 2, (80, 40, 20, 20), 0.6),  # nothing of the kind there
)


@pytest.fixture
def truth(tmp_path) -> Path:
    """Two pictures and their annotations, in the layout of Roboflow."""
    folder = tmp_path / "valid"
    folder.mkdir()
    for number, pixels in ((1, skimage.data.coffee()), (2, skimage.data.chelsea())):
        PIL.Image.fromarray(pixels[: 2 * SIZE[0] : 2, : 2 * SIZE[1] : 2]).save(
            folder / f"{number}.png"
        )
    images = [
        {"id": n, "file_name": f"{n}.png", "height": SIZE[0], "width": SIZE[1]} for n in (1, 2)
    ]
    annotations = [
        {"id": n, "image_id": i, "category_id": c, "iscrowd": crowd, **rectangle(*box)}
        for n, (i, c, box, crowd) in enumerate(TARGETS)
    ]
    categories = [{"id": n, "name": name} for n, name in enumerate(PHRASES, start=1)]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "_annotations.coco.json").write_text(json.dumps(data))
    return folder


@pytest.fixture
def predictions(tmp_path) -> Path:
    found = [
        {"image_id": i, "category_id": c, "score": s, **rectangle(*box)} for i, c, box, s in FOUND
    ]
    (tmp_path / "found.json").write_text(json.dumps(found))
    return tmp_path / "found.json"


def run(*arguments: str | Path) -> int:
    return cli.main([str(argument) for argument in arguments])


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_figures_and_files(truth, predictions, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--gt", truth, "--predictions", predictions, "--output", out) == 0
    figures = metrics(out)["metrics"]
    # Cat: right, wrong, right, and one in a crowd, which AP leaves out. Precision is 1 at the 51
    # recalls up to .5 and 2/3 at the other 50. Dog: 0. Cup has no targets.
    cat = (51 + 50 * 2 / 3) / 101
    for kind in ("segm", "bbox"):
        assert figures[f"{kind}/AP"] == pytest.approx(cat / 2)
        # 2 right, 1 wrong, 1 missed; presence: 1 right, 1 missed, 1 invented, 3 rightly not seen.
        assert figures[f"{kind}/positive_micro_F1"] == pytest.approx(2 / 3, abs=1e-4)
        mcc = (1 * 3 - 1 * 1) / (2 * 2 * 4 * 4) ** 0.5
        assert figures[f"{kind}/IL_MCC"] == pytest.approx(mcc, abs=1e-6)
        assert figures[f"{kind}/cgF1"] == pytest.approx(mcc * 2 / 3, abs=1e-4)
    # Cat: 800 pixels common, 400 wrong, 1600 of the crowd missed; cup and dog 0.
    assert figures["mIoU"] == pytest.approx(800 / 2800 / 3)
    assert figures["pair_IoU"] == pytest.approx(800 / 2800 / 2)
    assert figures["overall_IoU"] == pytest.approx(800 / (2800 + 400 + 400))

    phrases = {row["phrase"]: row for row in rows(out / "phrases.csv")}
    assert float(phrases["cat"]["AP"]) == pytest.approx(cat, abs=1e-6)
    assert phrases["cup"]["pmF1"] == ""
    assert (phrases["cup"]["IL_FP"], phrases["dog"]["IL_FN"]) == ("1", "1")
    pairs = rows(out / "pairs.csv")
    assert len(pairs) == 6
    assert [pairs[0][name] for name in ("targets", "tp50", "fp50", "fn50")] == list("2210")
    printed = capsys.readouterr().out
    assert "| cgF1 " in printed
    assert (out / "metrics.md").read_text().strip() in printed

    sheet = np.asarray(PIL.Image.open(out / "worst.png"))
    heights = SIZE[0] + 22 + 8  # a row: picture, line of text, gap
    assert len(sheet) == 3 * heights + 22 + 8  # dog, cup, cat; the pairs without errors are not in


def test_the_score_threshold_and_pairs_without_negatives(truth, predictions, tmp_path, capsys):
    command = ("--gt", truth, "--predictions", predictions, "--output", tmp_path, "--gallery", "0")
    assert run(*command, "--threshold", "0.85", "--negatives", "none") == 0
    data = metrics(tmp_path)
    assert data["pairs"]["scored_by_cgF1"] == 2
    assert data["metrics"]["segm/positive_micro_F1"] == pytest.approx(2 * 1 / 4, abs=1e-4)
    assert data["metrics"]["segm/cgF1"] == 0
    assert not (tmp_path / "worst.png").exists()
    assert "1 predictions of pairs outside the ground truth" in capsys.readouterr().err


@pytest.fixture
def checkpoint(monkeypatch) -> ImagePredictor:
    """A tiny model stands for every checkpoint."""
    predictor = tiny_predictor.predictor()
    monkeypatch.setattr(ImagePredictor, "from_pretrained", lambda path, dtype: predictor)
    return predictor


def test_a_checkpoint_is_run_and_its_predictions_are_kept(truth, tmp_path, checkpoint, capsys):
    data = json.loads((truth / "_annotations.coco.json").read_text())
    odd = {"height": 50, "width": 60}
    data["images"] += [
        {"id": 3, "file_name": "broken.png", **odd},
        {"id": 4, "file_name": "other.png", **odd},
    ]
    (truth / "_annotations.coco.json").write_text(json.dumps(data))
    whole = (truth / "1.png").read_bytes()
    (truth / "broken.png").write_bytes(whole[: len(whole) // 2])
    (truth / "other.png").write_bytes(whole)
    out, again = tmp_path / "out", tmp_path / "again"
    command = ("--gt", truth, "--threshold", "0.03")
    status = run(*command, "--checkpoint", "x", "--min-score", "0.02", "--output", out)
    assert status == 1  # two pictures failed, and the others are measured
    error = capsys.readouterr().err
    assert "failed: broken.png: " in error
    assert "other.png: is 150 x 100 pixels, its annotations are for 60 x 50" in error
    kept = json.loads((out / "predictions.json").read_text())
    assert [image["status"] for image in kept["images"]] == ["ok", "ok", "error", "error"]
    assert metrics(out)["pairs"]["scored_by_cgF1"] == 6

    # They are what the predictor finds, and measuring them again gives the same.
    checkpoint.set_image(truth / "2.png")
    found = checkpoint.predict(list(PHRASES), threshold=0.02)[1]
    coco = COCO(str(out / "predictions.json"))
    stored = coco.loadAnns(coco.getAnnIds(imgIds=2, catIds=2))
    assert len(stored) == len(found.scores) > 0
    np.testing.assert_array_equal([coco.annToMask(s) for s in stored], found.masks)
    assert run(*command, "--predictions", out / "predictions.json", "--output", again) == 1
    assert metrics(again)["metrics"] == metrics(out)["metrics"]
    assert metrics(out)["metrics"]["segm/positive_micro_F1"] >= 0


def test_an_interrupted_run_keeps_what_was_done(truth, tmp_path, checkpoint, monkeypatch, capsys):
    calls = []

    def stop_at_the_second(prompts, threshold):
        calls.append(prompts)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [Detections(np.zeros((0, *SIZE), bool), np.zeros((0, 4)), np.zeros(0))] * 3

    monkeypatch.setattr(checkpoint, "set_image", lambda pixels: None)
    monkeypatch.setattr(ImagePredictor, "image_size", SIZE)
    monkeypatch.setattr(checkpoint, "predict_many", stop_at_the_second)
    assert run("--gt", truth, "--checkpoint", "x", "--output", tmp_path / "out") == 130
    kept = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [image["file_name"] for image in kept["images"]] == ["1.png"]
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--predictions", "found.json", "--gt", "none.json"], "none.json: cannot be read"),
        (["--predictions", "none.json", "--gt", "valid"], "none.json: cannot be read"),
        (["--gt", "valid"], "--predictions --checkpoint is required"),
        (["--gt", "valid", "--checkpoint", "x", "--predictions", "y"], "not allowed with"),
        (["--gt", "valid", "--predictions", "found.json", "--threshold", "7"], "from 0 to 1"),
        (["--gt", "valid", "--checkpoint", "x", "--images", "nowhere"], "nowhere: no such folder"),
        (
            ["--gt", "valid", "--checkpoint", "x", "--images", "."],
            "missing pictures",
        ),
        (["--gt", "valid", "--checkpoint", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_explained(
    truth, predictions, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    try:
        status = run(*arguments, "--output", "out")
    except SystemExit as stop:  # argparse's own
        status = stop.code
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_figures_that_cannot_be_written(truth, predictions, tmp_path, monkeypatch, capsys):
    (tmp_path / "out" / "metrics.json").mkdir(parents=True)
    assert run("--gt", truth, "--predictions", predictions, "--output", tmp_path / "out") == 1
    assert "cannot write the results" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert run("--gt", truth, "--predictions", predictions, "--output", tmp_path / "file") == 2
    assert "cannot make the folder" in capsys.readouterr().err


def test_the_program_measures_without_jax(truth, predictions, tmp_path):
    """In a process of its own; figures of given predictions need no accelerator library."""
    code = "import sys, runpy\ntry: runpy.run_path('evaluate.py', {}, '__main__')\n"
    code += "finally: print('jax' in sys.modules)"
    command = [sys.executable, "-c", code, "--gt", truth, "--predictions", predictions]
    command += ["--output", tmp_path / "out", "--gallery", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "| cgF1 " in done.stdout
    assert done.stdout.endswith("False\n")
    help_ = subprocess.run([*command[:3], "--help"], cwd=ROOT, capture_output=True, text=True)
    assert "examples:" in help_.stdout
    assert help_.stdout.endswith("False\n")
