"""The weights that the package ships: what they are, and that they find what they should.

On a small fixed part of the held-out sets. Figures of so few pictures are rougher than those in the
weights' metadata, which are of all; they may fall by ``MARGIN`` on other machines, whose rounding
turns answers that lie on the threshold.
"""

from __future__ import annotations

import json

import pytest

from sam3_jax import checkpoint
from sam3_jax.checkpoint.tree import flatten
from sam3_jax.demo import figures, weights
from sam3_jax.demo.bundle import MOST
from sam3_jax.demo.held_out import COUNTS, write_split
from sam3_jax.inference.image import ImagePredictor

PICTURES = 12  # the first of each set
MARGIN = 0.05
MEASURED = {  # float32, one CPU
    "text": {"cgF1": 0.575, "IL_MCC": 0.931},
    "unseen": {"cgF1": 0.084},
    "exemplar": {"cgF1": 0.630},
    "clicks": {"mIoU_1": 0.737, "mIoU_3": 0.748},
}


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
