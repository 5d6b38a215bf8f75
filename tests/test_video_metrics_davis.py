"""J&F against its definition by dilation, worked examples, and DAVIS' folders."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from skimage.morphology import dilation, disk

from sam3_jax.data.records import AnnotationError
from sam3_jax.evaluation import cli
from sam3_jax.evaluation.video import davis
from sam3_jax.evaluation.video.davis_folders import load_sequences, read_frames

PALETTE = np.random.default_rng(0).integers(0, 256, 768).tolist()  # fewer colours, fewer bits


def blob(rng: np.random.Generator, shape: tuple[int, int] = (24, 31)) -> np.ndarray:
    """Some rectangles together, at times up to the border, at times nothing."""
    mask = np.zeros(shape, bool)
    for _ in range(rng.integers(0, 4)):
        y, x = rng.integers(0, shape[0]), rng.integers(0, shape[1])
        mask[y : y + rng.integers(1, 12), x : x + rng.integers(1, 12)] = True
    return mask


def plain_outline(mask: np.ndarray) -> np.ndarray:
    """Pixel by pixel, as DAVIS' seg2bmap defines it."""
    h, w = mask.shape
    edge = np.zeros_like(mask)
    for y in range(h):
        for x in range(w):
            neighbours = [(y, x + 1), (y + 1, x)]
            if y < h - 1 and x < w - 1:
                neighbours.append((y + 1, x + 1))
            edge[y, x] = any(mask[y, x] != mask[b, a] for b, a in neighbours if b < h and a < w)
    return edge


def plain_contour(found: np.ndarray, truth: np.ndarray, radius: int) -> float:
    """F-measure with each outline fattened by a disc, the challenge's own way."""
    edges = plain_outline(found), plain_outline(truth)
    fat = [dilation(edge, disk(radius)) for edge in edges]
    sizes = [edge.sum() for edge in edges]
    if not sizes[0] or not sizes[1]:
        return float(sizes[0] == sizes[1])
    precision, recall = (edges[0] & fat[1]).sum() / sizes[0], (edges[1] & fat[0]).sum() / sizes[1]
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_contours_are_compared_as_the_challenge_does(rng):
    diagonal = np.hypot(24, 31)
    for n in range(30):
        found, truth = blob(rng), blob(rng)
        radius = 1 + n % 5
        tolerance = (radius - 0.5) / diagonal  # rounded up
        expected = plain_contour(found, truth, radius)
        # Quotients of the same integers; the rest is rounding.
        assert davis.contour(found, truth, tolerance) == pytest.approx(expected, abs=1e-12)
        np.testing.assert_array_equal(davis.outline(found), plain_outline(found))


def test_j_and_f_of_worked_examples():
    truth = np.zeros((480, 854), bool)  # the tolerance is 7.84 pixels: 8
    truth[100:200, 100:200] = True
    for shift, f in ((8, 1.0), (9, None)):
        found = np.roll(truth, shift, 1)
        assert davis.region(found, truth) == pytest.approx((100 - shift) / (100 + shift))
        if f:
            assert davis.contour(found, truth) == f
        else:
            assert 0.5 < davis.contour(found, truth) < 1  # the lower and upper sides still fit
    empty = np.zeros_like(truth)
    assert (davis.region(empty, empty), davis.contour(empty, empty)) == (1, 1)
    assert (davis.region(empty, truth), davis.contour(empty, truth)) == (0, 0)
    assert (davis.region(truth, empty), davis.contour(truth, empty)) == (0, 0)
    far = np.roll(truth, (200, 300), (0, 1))
    assert (davis.region(far, truth), davis.contour(far, truth)) == (0, 0)
    full = np.ones((4, 5), bool)
    assert davis.contour(full, full) == 1  # without an outline


def test_statistics_are_the_challenges():
    # Eight frames: the quarters end at 1, 2.75, 4.5, 6.25, 8, rounded; both ends belong to one.
    values = np.asarray([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    result = davis.statistics(values)
    assert result.mean == pytest.approx(0.65)
    assert result.recall == 5 / 8  # .5 is not above .5
    assert result.decay == pytest.approx(0.9 - 0.4)
    # Longer than 256 frames, where the challenge's own code takes its borders modulo 256.
    assert davis.statistics(np.linspace(1, 0, 400)).decay == pytest.approx(0.75, abs=0.01)
    assert davis.statistics(np.asarray([0.7])) == (0.7, 1, 0)


def save(path: Path, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = PIL.Image.fromarray(labels.astype(np.uint8))
    picture.putpalette(PALETTE)
    picture.save(path)


def labels(*starts: int) -> np.ndarray:
    """Objects 1, 2, ... of 10 x 10 pixels at these columns; 30 x 60 pixels."""
    picture = np.zeros((30, 60), np.uint8)
    for label, start in enumerate(starts, start=1):
        picture[10:20, start : start + 10] = label
    return picture


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """A copy of DAVIS with two sequences, and predictions for them."""
    gt, found = tmp_path / "DAVIS", tmp_path / "found"
    root = gt / "Annotations" / "480p"
    for t in range(5):
        save(root / "cars" / f"{t:05d}.png", labels(5 + t, 40))
        save(root / "dog" / f"{t:05d}.png", labels(20))
        # First and last frame do not count, wrong as they are.
        wrong = t in (0, 4)
        save(found / "cars" / f"{t:05d}.png", labels(40, 5) if wrong else labels(5 + t, 45))
        save(found / "dog" / f"{t:05d}.png", labels(20))
    (found / "dog" / "00002.png").unlink()  # a frame without prediction
    return gt, found


def run(*arguments: str | Path) -> int:
    return cli.main([str(argument) for argument in arguments])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_folders_end_to_end(folders, tmp_path, capsys):
    gt, found = folders
    out = tmp_path / "out"
    command = ("--gt", gt, "--predictions", found, "--output", out)
    assert run(*command, "--max-bad", "0.2") == 0
    data = json.loads((out / "metrics.json").read_text())
    # Objects: 1; one moved by half its width; one with 2 of 3 frames.
    half = davis.contour(labels(45) > 0, labels(40) > 0)
    j, f = (1 + 1 / 3 + 2 / 3) / 3, (1 + half + 2 / 3) / 3
    assert 0 < half < 1
    assert data["metrics"]["J"] == pytest.approx(j)
    assert data["metrics"]["F"] == pytest.approx(f)
    assert data["metrics"]["J&F"] == pytest.approx((j + f) / 2)
    assert data["metrics"]["J_recall"] == pytest.approx((1 + 0 + 2 / 3) / 3)
    assert (data["layout"], data["objects"], data["sequences"]) == ("davis", 3, 2)
    objects = rows(out / "objects.csv")
    assert [(row["sequence"], row["object"], row["frames"]) for row in objects] == [
        ("cars", "1", "3"),
        ("cars", "2", "3"),
        ("dog", "1", "3"),
    ]
    assert float(objects[1]["J"]) == pytest.approx(1 / 3, abs=1e-6)  # six digits
    sequences = {row["sequence"]: row for row in rows(out / "sequences.csv")}
    assert float(sequences["cars"]["J"]) == pytest.approx(2 / 3, abs=1e-6)
    streams = capsys.readouterr()
    assert "| J&F " in streams.out
    assert "frames without a prediction, counted as nothing found: 1" in streams.err
    # One frame of six is more than a tenth.
    assert run(*command) == 2
    # Only one sequence, by name.
    (tmp_path / "val.txt").write_text("cars\n")
    assert run(*command, "--sequences", tmp_path / "val.txt") == 0
    assert json.loads((out / "metrics.json").read_text())["objects"] == 2


def test_void_pixels_and_binary_masks(tmp_path):
    gt, found = tmp_path / "gt", tmp_path / "found"
    for t in range(3):
        truth = labels(20)
        truth[10:20, 30:35] = 255
        save(gt / "void" / f"{t}.png", truth)
        save(gt / "binary" / f"{t}.png", 255 * labels(20))
        for name in ("void", "binary"):
            save(found / name / f"{t}.png", labels(25))  # half of it on void
    data, problems, _ = load_sequences(gt, found)
    scores = [davis.score_objects(s.name, read_frames(s, problems), s.objects)[0] for s in data]
    assert [score.sequence for score in scores] == ["binary", "void"]
    assert [score.j.tolist() for score in scores] == [[5 / 15], [5 / 10]]
    assert not problems.found


def test_masks_that_cannot_be_read(folders, tmp_path):
    gt, found = folders
    (gt / "Annotations" / "480p" / "dog" / "00001.png").write_bytes(b"no picture")
    (found / "cars" / "00001.png").write_bytes(b"no picture")
    PIL.Image.new("RGB", (60, 30)).save(found / "cars" / "00002.png")
    data, problems, notes = load_sequences(gt, found)
    scores = {}
    for sequence in data:
        for score in davis.score_objects(
            sequence.name, read_frames(sequence, problems), sequence.objects
        ):
            scores[score.sequence, score.object_id] = score.j.tolist()
    assert scores == {
        ("cars", 1): [0, 0, 1],
        ("cars", 2): [0, 0, pytest.approx(1 / 3)],
        ("dog", 1): [0, 1],
    }
    assert set(problems.found) == {
        "annotations that cannot be read, left out",
        "predictions that cannot be read, counted as nothing found",
        "predictions that are RGB pictures, not indexed ones, counted as nothing found",
        "frames without a prediction, counted as nothing found",
    }
    assert not notes


def test_a_sequence_without_predictions_counts_as_nothing_found(folders):
    gt, found = folders
    for path in (found / "cars").iterdir():
        path.unlink()
    data, problems, _ = load_sequences(gt, found)
    scores = davis.score_objects("cars", read_frames(data[0], problems), data[0].objects)
    assert [score.j.sum() for score in scores] == [0, 0]
    assert list(problems.found.values()) == [["cars"]]


def test_mistakes_in_folders_are_explained(folders, tmp_path, capsys):
    gt, found = folders
    command = ("--gt", gt, "--output", tmp_path / "out", "--max-bad", "1")
    save(found / "cars" / "00003.png", labels(5, 20, 40))
    assert run(*command, "--predictions", found) == 2
    error = capsys.readouterr().err
    assert "00003.png: has the label 3, the objects of cars are 1, 2" in error
    save(found / "cars" / "00003.png", labels(5)[:20])
    assert run(*command, "--predictions", found) == 2
    assert "is 60 x 20 pixels" in capsys.readouterr().err
    assert run(*command, "--predictions", tmp_path / "nowhere") == 2
    assert "is no folder with a folder of PNG files" in capsys.readouterr().err
    (tmp_path / "names.txt").write_text("plane")
    assert run(*command, "--predictions", found, "--sequences", tmp_path / "names.txt") == 2
    assert "has no sequence plane" in capsys.readouterr().err
    assert run(*command, "--predictions", found, "--sequences", tmp_path / "none.txt") == 2
    assert "cannot read" in capsys.readouterr().err
    save(tmp_path / "other" / "cat" / "00000.png", labels(5))
    with pytest.raises(AnnotationError, match="has none of the 2 sequences"):
        load_sequences(gt, tmp_path / "other")
    with pytest.raises(AnnotationError, match="nothing to measure; sequences of fewer than three"):
        load_sequences(tmp_path / "other", tmp_path / "other")
