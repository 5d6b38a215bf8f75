"""``evaluate.py --checkpoint`` on videos: what the model finds is measured. A tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

import video_session
from sam3_jax.evaluation import cli
from sam3_jax.inference.rle import encode_mask
from sam3_jax.tracking.masks import resize
from sam3_jax.video.display import strongest
from sam3_jax.video.predictor import VideoPredictor
from video_session import FRAMES, SIZE, clip


@pytest.fixture(scope="module")
def predictor() -> VideoPredictor:
    return video_session.predictor()


@pytest.fixture
def run(predictor, monkeypatch, tmp_path):
    """Runs the command on the tiny model, writing to ``tmp_path / "out"``."""
    monkeypatch.setattr(VideoPredictor, "from_pretrained", lambda *_, **__: predictor)

    def call(*arguments: str | Path) -> int:
        common = ["--checkpoint", "somewhere", "--output", tmp_path / "out"]
        return cli.main([str(argument) for argument in [*common, *arguments]])

    return call


def write_frames(folder: Path, pictures: np.ndarray, suffix: str = ".png") -> list[str]:
    folder.mkdir(parents=True)
    names = [f"{number:05d}{suffix}" for number in range(len(pictures))]
    for name, picture in zip(names, pictures, strict=True):
        PIL.Image.fromarray(picture).save(folder / name)
    return names


def test_tracks_of_a_checkpoint(run, predictor, tmp_path, monkeypatch, capsys):
    """The annotations are what the model finds, so all is right; a second run finds nothing new."""
    session = predictor.start(clip())
    session.add_text("cat")
    frames = list(session.propagate())
    names = write_frames(tmp_path / "JPEGImages" / "a", clip())
    video = {"height": SIZE[0], "width": SIZE[1]}
    videos = [
        {"id": 7, "file_names": [f"a/{name}" for name in names], "length": FRAMES, **video},
        {"id": 8, "file_names": ["gone/0.png"], "length": 1, **video},
        {"id": 9, "file_names": [f"a/{name}" for name in names[:3]], "length": 3, **video}
        | {"width": 99},
    ]
    annotations = []
    for number in sorted({i for frame in frames for i in frame.ids.tolist()}):
        masks = [frame.masks[frame.ids == number] for frame in frames]
        rles = [encode_mask(mask[0]) if len(mask) else None for mask in masks]
        ids = {"id": number, "video_id": 7, "category_id": 2, "iscrowd": 0}
        annotations.append({**ids, "segmentations": rles})
    assert annotations
    categories = [{"id": 1, "name": "blue square"}, {"id": 2, "name": "cat"}]
    gt = tmp_path / "gt.json"
    data = {"videos": videos, "annotations": annotations, "categories": categories}
    gt.write_text(json.dumps(data))
    options = ("--gt", gt, "--negatives", "none", "--threshold", "0.01")
    gt_only_cat = json.loads(gt.read_text())
    gt_only_cat["annotations"] += [
        {"id": 100 + v, "video_id": v, "category_id": 2, "segmentations": [encode_mask(m)] * n}
        for v, n, m in ((8, 1, np.ones(SIZE, bool)), (9, 3, np.ones((SIZE[0], 99), bool)))
    ]
    gt.write_text(json.dumps(gt_only_cat))
    assert run(*options) == 1
    error = capsys.readouterr().err
    assert "no such file" in error
    assert "is 80 x 64 pixels, its annotations are for 99 x 64" in error
    assert "2 videos failed and are in no figure" in error
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["metrics"]["positive_micro_F1"] == pytest.approx(1, abs=1e-3)
    assert report["metrics"]["pHOTA"] == pytest.approx(1, abs=1e-6)

    monkeypatch.setattr(VideoPredictor, "start", None)  # nothing is tracked again
    figures = report["metrics"]
    assert run(*options) == 1
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["metrics"] == figures


def test_masks_of_the_first_frame(run, predictor, tmp_path, capsys):
    """Every label is followed from where it first appears, and no pixel has two."""
    labels = np.zeros((FRAMES, *SIZE), np.uint8)
    labels[:, 8:40, 8:40] = 1
    labels[:, 24:60, 30:70] = 5
    labels[3:, 2:20, 50:78] = 9
    davis = tmp_path / "DAVIS"
    write_frames(davis / "Annotations" / "480p" / "seq", labels)
    write_frames(davis / "JPEGImages" / "480p" / "seq", clip())
    write_frames(davis / "Annotations" / "480p" / "odd", labels[:, :-2])
    write_frames(davis / "JPEGImages" / "480p" / "odd", clip())
    assert run("--gt", davis) == 1
    assert "failed: odd: a mask must be (height, width) = (64, 80)" in capsys.readouterr().err
    session = predictor.start(clip())
    order = {session.add_mask(3 * (v == 9), labels[-1] == v): v for v in (1, 5, 9)}
    written = tmp_path / "out" / "predictions" / "seq"
    assert len(list(written.iterdir())) == FRAMES
    for frame in session.propagate(exclusive=True):
        assert frame.masks.sum(0).max(initial=0) <= 1
        expected = np.zeros(SIZE, int)
        for number, mask in zip(frame.ids.tolist(), frame.masks, strict=True):
            expected[mask] = order[number]
        found = np.asarray(PIL.Image.open(written / f"{frame.index:05d}.png"))
        np.testing.assert_array_equal(found, expected)
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert 0 < report["metrics"]["J&F"] < 1
    assert list(report["info"]["failed_sequences"]) == ["odd"]


def test_mistakes(run, tmp_path, capsys):
    labels = np.ones((3, *SIZE), np.uint8)
    write_frames(tmp_path / "masks" / "seq", labels)
    assert run("--gt", tmp_path / "masks") == 2
    assert "the frames are not beside the annotations (JPEGImages)" in capsys.readouterr().err
    assert run("--gt", tmp_path / "masks", "--images", tmp_path / "nowhere") == 2
    assert "no sequence could be predicted; the first: " in capsys.readouterr().err


def test_a_pixel_goes_to_the_strongest():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 5, 6)).astype(np.float32)
    shown = np.asarray([True, True, False, True])
    size = (20, 31)
    found = np.asarray(strongest(jnp.asarray(logits), jnp.asarray(shown), size))
    up = np.array(resize(jnp.asarray(logits), size))
    up[~shown] = -np.inf
    best = up.argmax(0)
    for number, mask in enumerate(found):
        np.testing.assert_array_equal(mask, (best == number) & (up[number] > 0))
