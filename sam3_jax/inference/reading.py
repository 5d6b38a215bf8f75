"""Reads pictures ahead of the devices, in threads, as many as the memory bears."""

from __future__ import annotations

import collections
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sam3_jax.data.images import load_image, resize_image
from sam3_jax.inference.clicks import object_prompt
from sam3_jax.inference.engine import Engine
from sam3_jax.inference.jobs import Job
from sam3_jax.inference.prompts import Prompt, PromptError, pad_geometry
from sam3_jax.inference.tiles import Window, tile_grid
from sam3_jax.inference.work import FAILURES, Loaded, Settings, Work, failed

SHARE_OF_MEMORY = 8  # one part of so many is for decoded pictures that are being worked on
LEAST_BYTES = 2**30  # that they may have in any case


def load_ahead(
    pool: ThreadPoolExecutor,
    engine: Engine,
    work: Iterable[Work],
    settings: Settings,
    held: dict[int, int],
) -> Iterator[Loaded | dict | None]:
    """Pictures in the order of ``work``, read by threads, bounded in number and in bytes.

    None asks to bring what is under way to an end, because it holds all the memory there is.
    """
    waiting: collections.deque[Future] = collections.deque()
    limit = 2 * settings.batch_size + settings.workers
    room = _bytes_for_pictures()

    def first() -> Loaded | dict:
        item = waiting.popleft().result()
        if isinstance(item, Loaded) and item.image is None:
            held[item.work.index] = 0
        return item

    for item in work:
        size = _decoded_bytes(item.job.image)
        while len(waiting) >= limit:
            yield first()
        while sum(held.values()) + size > room and any(held.values()):
            yield first() if waiting else None
        held[item.index] = size
        waiting.append(pool.submit(_load, engine, item, settings))
    while waiting:
        yield first()


def _bytes_for_pictures() -> int:
    """What decoded pictures may take of this machine's memory."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        memory = 0
    return max(memory // SHARE_OF_MEMORY, LEAST_BYTES)


def _decoded_bytes(path: Path) -> int:
    """Size of a picture in memory by its header; 0 where it has none (reading it will tell)."""
    try:
        with Image.open(path) as image:
            return 3 * image.width * image.height
    except Exception:  # whatever is wrong with it, it is reported where it is read
        return 0


def _load(engine: Engine, work: Work, settings: Settings) -> Loaded | dict:
    """Reads, checks and resizes one picture; an error record if that fails."""
    start = time.monotonic()
    job = work.job
    try:
        image = load_image(job.image)
        size = image.shape[:2]
        if settings.everything:
            return Loaded(work, start, size, image)
        click = object_prompt(engine, job, size) if job.about_object else None
        prompts = () if click else _prompts(job)
        if prompts:  # one bad box must not fail the batch that the picture will be part of
            pad_geometry(prompts, [size] * len(prompts))
        windows = [(0, 0, *size)]
        if settings.tile and max(size) > settings.tile and prompts:
            if job.boxes:
                raise PromptError("boxes do not go with tiles, most of which do not show them")
            windows += tile_grid(size, settings.tile, settings.tile_overlap)
        whole = model_input(engine, image, windows[0])
        if not settings.overlay and len(windows) == 1:
            image = None
        return Loaded(work, start, size, image, prompts, click, tuple(windows), whole)
    except FAILURES as error:
        return failed(work, error)


def model_input(
    engine: Engine, image: UInt8[np.ndarray, "h w 3"], window: Window
) -> UInt8[np.ndarray, "s s 3"]:
    """A part of a picture in the model's size."""
    y0, x0, y1, x1 = window
    return resize_image(image[y0:y1, x0:x1], (engine.config.image_size,) * 2)


def _prompts(job: Job) -> tuple[Prompt, ...]:
    return tuple(Prompt(p, job.boxes, job.box_labels) for p in job.phrases or (None,))
