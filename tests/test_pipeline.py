"""The bounds of the pipeline's memory, with a model that finds nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sam3_jax.inference import detecting, pipeline, reading
from sam3_jax.inference.engine import Engine
from sam3_jax.inference.instances import Kept
from sam3_jax.inference.jobs import make_job
from sam3_jax.inference.work import Settings, Work

NOTHING = Kept(*(np.zeros(shape, np.float32) for shape in ((0,), (0, 4), (0, 28, 28))))


class Model(Engine):
    """An engine without parameters that counts what it gets."""

    config = SimpleNamespace(image_size=14)

    def __init__(self) -> None:
        self.batches: list[int] = []

    def submit(self, pixels: np.ndarray, prompts: list, *_: object) -> list:
        assert pixels.dtype == np.uint8  # bytes: a quarter of float32
        self.batches.append(len(pixels))
        return prompts

    def collect(self, prompts: list, *_: object, **__: object) -> list[list[Kept]]:
        return [[NOTHING] * len(own) for own in prompts]

    def boxes_from_masks(self, _: object) -> bool:
        return False


def run(tmp_path: Path, **settings: object) -> tuple[list[dict], Model]:
    """Nine pictures of 3 MB each, in batches of four; the third cannot be read."""
    model, work = Model(), []
    for i in range(9):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (1000, 1000)).save(path)
        if i == 2:
            path.write_bytes(b"")
        work.append(Work(i, make_job(path, phrases=["cat"]), path.stem))
    chosen = Settings(batch_size=4, workers=2, **settings)
    return list(pipeline.process(model, work, tmp_path, chosen)), model


def test_pictures_come_in_order_in_full_batches(tmp_path):
    found, model = run(tmp_path)
    assert [record["index"] for record in found] == list(range(9))
    assert [record["status"] for record in found].count("error") == 1
    assert model.batches == [4, 4]


@pytest.mark.parametrize(("room", "largest"), [(10e6, 3), (1, 1)])
def test_decoded_pictures_are_bounded_in_bytes(tmp_path, monkeypatch, room, largest):
    """Three pictures fit, then one: batches start before they are full, and all get done."""
    monkeypatch.setattr(reading, "_bytes_for_pictures", lambda: room)
    found, model = run(tmp_path)
    assert [record["index"] for record in found] == list(range(9))
    assert sum(model.batches) == 8
    assert max(model.batches) <= largest


def test_without_an_overlay_pictures_are_let_go_of(tmp_path, monkeypatch):
    """They then do not count, once the model's input is made of them."""
    monkeypatch.setattr(reading, "_bytes_for_pictures", lambda: 4e6)
    _, model = run(tmp_path, overlay=False)
    assert model.batches == [4, 4]


def test_tiles_are_cut_when_their_turn_comes(tmp_path, monkeypatch):
    made = []
    resized = reading.model_input
    for module in (reading, detecting):
        monkeypatch.setattr(
            module, "model_input", lambda *args: made.append(len(model)) or resized(*args)
        )
    model: list[int] = []
    submit = Model.submit
    monkeypatch.setattr(Model, "submit", lambda *args: model.append(len(args[1])) or submit(*args))
    found, _ = run(tmp_path, tile=600)
    assert sum(model) == 8 * (1 + 4)  # the whole and 2 x 2 tiles
    assert made[-1] > 6  # of 10: the last of them when most batches had been through
    assert all(record["status"] == "ok" for record in found if record["index"] != 2)
