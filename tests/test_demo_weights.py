"""The weights that the package ships: what they are, and that they find what they should.

On a small fixed part of the held-out sets. Figures of so few pictures are rougher than those in the
weights' metadata, which are of all; they may fall by ``MARGIN`` on other machines, whose rounding
turns answers that lie on the threshold.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from sam3_jax import checkpoint
from sam3_jax.checkpoint.tree import flatten
from sam3_jax.demo import figures, weights
from sam3_jax.demo.bundle import MOST
from sam3_jax.demo.clips import LEAST
from sam3_jax.demo.held_out import COUNTS, write_split
from sam3_jax.demo.motion import Movie, is_seen_at_first, make_movie, masks_of, pictures_of
from sam3_jax.evaluation.video.davis import region
from sam3_jax.inference.image import ImagePredictor
from sam3_jax.video.predictor import VideoPredictor

PICTURES = 12  # the first of each set
MARGIN = 0.05
MEASURED = {  # float32, one CPU
    "text": {"cgF1": 0.575, "IL_MCC": 0.931},
    "unseen": {"cgF1": 0.084},
    "exemplar": {"cgF1": 0.630},
    "clicks": {"mIoU_1": 0.737, "mIoU_3": 0.748},
}
# The first of the validation clips, and of their frames. (Of two clips a single phrase decided.)
CLIPS, FRAMES = 4, 16
TRACKED = 0.857  # mean IoU of objects that are given by their first masks
NAMED = 0.808  # of all that a phrase finds in a frame


@pytest.fixture(scope="module")
def predictor() -> ImagePredictor:
    return ImagePredictor.from_pretrained(weights.weights_path(), dtype="float32")


def test_size_and_provenance():
    files = [file for file in weights.weights_path().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= MOST
    text = (weights.FOLDER / "config.json").read_text()
    metadata = json.loads(text)["metadata"]
    assert metadata["figures"].keys() == MEASURED.keys()
    assert metadata["seed"] == 0
    assert "/" not in metadata["source"]
    for file in files:
        assert b"/home/" not in file.read_bytes(), file


def test_every_stage_has_its_weights():
    paths = flatten(checkpoint.load(weights.weights_path()).params)
    parts = {path.split("/")[0] for path in paths}
    detector = {"vision", "text", "geometry", "fusion", "decoder", "scoring", "segmentation"}
    assert detector | {"tracker"} == parts


def test_figures_of_a_part_of_the_held_out_sets(predictor, tmp_path, monkeypatch):
    for split in figures.SETS:
        monkeypatch.setitem(COUNTS, split, PICTURES)
        write_split(tmp_path / split, split)
    found = figures.measure_demo(predictor, tmp_path)
    for kind, values in MEASURED.items():
        for name, value in values.items():
            assert found[kind][name] >= value - MARGIN, (kind, name)


@pytest.fixture(scope="module")
def tracker() -> VideoPredictor:
    return VideoPredictor.from_pretrained(weights.weights_path(), dtype="float32")


def movies() -> list[tuple[Movie, np.ndarray]]:
    """Clips and their frames."""
    made = [make_movie("valid", index, FRAMES) for index in range(CLIPS)]
    return [(movie, np.stack(pictures_of(movie, "valid", i))) for i, movie in enumerate(made)]


def test_objects_that_first_masks_give_are_followed(tracker):
    ious = []
    for movie, frames in movies():
        truth, session = masks_of(movie), tracker.start(frames)
        given = {session.add_mask(0, truth[0][n]): n for n in is_seen_at_first(truth, LEAST)}
        for frame in session.propagate(1):
            found = dict(zip(frame.ids.tolist(), frame.masks, strict=True))
            nothing = np.zeros(frames.shape[1:3], bool)
            ious += [region(found.get(i, nothing), truth[frame.index][n]) for i, n in given.items()]
    assert np.mean(ious) >= TRACKED - MARGIN


def test_what_phrases_name_is_followed(tracker):
    """Everything that a phrase finds in a frame beside everything that it names."""
    ious = []
    for movie, frames in movies():
        truth = masks_of(movie)
        named = {query.text: list(query.answers(movie.frames[0])) for query in movie.queries}
        session = tracker.start(frames)
        for phrase in named:
            session.add_text(phrase)
        for frame in session.propagate():
            for phrase, answers in named.items():
                mine = np.array([p == phrase for p in frame.phrases], bool)
                found = frame.masks[mine].any(0)
                ious.append(region(found, truth[frame.index][answers].any(0)))
    assert np.mean(ious) >= NAMED - MARGIN
