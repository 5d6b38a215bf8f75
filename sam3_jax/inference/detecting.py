"""Batches of windows of pictures through the model, one computed while another is read back."""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from sam3_jax.inference.automask import AutomaticMaskGenerator
from sam3_jax.inference.clicks import click_object
from sam3_jax.inference.engine import Engine, Round
from sam3_jax.inference.image import ImagePredictor
from sam3_jax.inference.reading import model_input
from sam3_jax.inference.work import Found, Loaded, Settings

BATCHES_ON_DEVICE = 2  # one is computed while the other is read back


class _Slot(NamedTuple):
    """One window of a picture in a batch."""

    found: Found
    window: int


def detect(
    pool: ThreadPoolExecutor,
    engine: Engine,
    loaded: Iterable[Loaded | dict | None],
    settings: Settings,
) -> Iterator[Found | dict | None]:
    """Batches of windows through the model; pictures come out in order when complete.

    None passes through behind all that came before it.
    """
    generator = _mask_generator(engine, settings)
    slots: list[_Slot] = []
    running: collections.deque[tuple[list[_Slot], list[Round]]] = collections.deque()
    order: collections.deque[Found | dict] = collections.deque()

    def start() -> None:
        batch = slots[: settings.batch_size]
        del slots[: settings.batch_size]
        found = [slot.found.loaded for slot in batch]
        inputs = np.stack(list(pool.map(functools.partial(_slot_input, engine), batch)))
        sizes = [one.size for one in found]
        rounds = engine.submit(inputs, [one.prompts for one in found], sizes, settings.batch_size)
        running.append((batch, rounds))
        if len(running) >= BATCHES_ON_DEVICE:
            read_back()

    def read_back() -> None:
        batch, rounds = running.popleft()
        thresholds = [_thresholds(slot.found.loaded, settings) for slot in batch]
        kept = engine.collect(rounds, thresholds, settings.options, semantic=settings.semantic)
        for slot, new in zip(batch, kept, strict=True):
            slot.found.kept.append(new)

    def finish() -> None:
        while slots:
            start()
        while running:
            read_back()

    def complete() -> Iterator[Found | dict]:
        while order and (isinstance(order[0], dict) or order[0].complete):
            yield order.popleft()

    for item in loaded:
        if item is None:
            finish()
            yield from complete()
            yield None
        elif isinstance(item, dict):
            order.append(item)
        elif generator:
            order.append(Found(item, [], generator.generate(item.image)))
        elif item.click is not None:
            order.append(Found(item, [[click_object(engine, item.whole[None], item.click)]]))
        else:
            order.append(Found(item, []))
            slots += [_Slot(order[-1], i) for i in range(len(item.windows))]
        while len(slots) >= settings.batch_size:
            start()
        yield from complete()
    finish()
    yield from complete()


def _slot_input(engine: Engine, slot: _Slot) -> UInt8[np.ndarray, "s s 3"]:
    """Tiles are cut and resized when their turn comes: hundreds would take a GB."""
    loaded = slot.found.loaded
    if slot.window == 0:
        return loaded.whole
    return model_input(engine, loaded.image, loaded.windows[slot.window])


def _mask_generator(engine: Engine, settings: Settings) -> AutomaticMaskGenerator | None:
    if settings.everything is None:
        return None
    return AutomaticMaskGenerator(
        ImagePredictor.from_engine(engine),
        points_per_side=settings.everything.points_per_side,
        crop_n_layers=settings.everything.crop_layers,
        output_mode="coco_rle",
    )


def _thresholds(loaded: Loaded, settings: Settings) -> list[float]:
    own = loaded.work.job.threshold
    return [settings.threshold if own is None else own] * len(loaded.prompts)
