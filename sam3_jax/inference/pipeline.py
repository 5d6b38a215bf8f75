"""Many pictures through the model: reading, devices and writing overlap.

Threads read and resize pictures ahead of the devices; batches are started while the one before is
still being computed; threads turn what comes back into run lengths and files. Records are written
in the order of the work, by one thread. Memory is bounded: so many batches on the way, and so many
bytes of decoded pictures; where these are spent, a batch starts before it is full.
"""

from __future__ import annotations

import collections
import functools
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sam3_jax.data.images import ImageError, load_image, resize_image
from sam3_jax.inference import records, writers
from sam3_jax.inference.automask import AutomaticMaskGenerator, MaskRecord
from sam3_jax.inference.clicks import click_object, object_prompt
from sam3_jax.inference.engine import Engine, Kept, Round
from sam3_jax.inference.image import ImagePredictor
from sam3_jax.inference.jobs import Job
from sam3_jax.inference.options import DEFAULTS, Options
from sam3_jax.inference.placed import Placed, annotation, place
from sam3_jax.inference.postprocess import detections
from sam3_jax.inference.prompts import Prompt, PromptError, pad_geometry
from sam3_jax.inference.tiles import Window, merge_tiles, tile_grid
from sam3_jax.types import ClickPrompt

BATCHES_ON_DEVICE = 2  # one is computed while the other is read back
SHARE_OF_MEMORY = 8  # one part of so many is for decoded pictures that are being worked on
LEAST_BYTES = 2**30  # that they may have in any case
FAILURES = (ImageError, OSError, ValueError, MemoryError)  # of one picture, not of the run


class Everything(NamedTuple):
    """Segment all there is, see :class:`sam3_jax.inference.automask.AutomaticMaskGenerator`."""

    points_per_side: int = 32
    crop_layers: int = 0


class Settings(NamedTuple):
    """How a run works and what it writes."""

    threshold: float = 0.5
    options: Options = DEFAULTS
    batch_size: int = 1
    tile: int = 0  # side in pixels of the tiles that larger pictures are cut into; 0: never
    tile_overlap: float = 0.25
    everything: Everything | None = None  # instead of the jobs' prompts
    overlay: bool = True
    masks: bool = False
    semantic: bool = False
    labelme: bool = False
    yolo: bool = False
    classes: tuple[str, ...] = ()  # of the whole run, for YOLO's numbers
    workers: int = 4  # threads that read, and as many that write


class Work(NamedTuple):
    """A job and what its outputs are called."""

    index: int  # in the whole list
    job: Job
    name: str


class _Loaded(NamedTuple):
    """A picture in memory, as the model takes it."""

    work: Work
    start: float
    size: tuple[int, int]  # height, width
    image: UInt8[np.ndarray, "h w 3"] | None  # None where it is needed no more
    prompts: tuple[Prompt, ...] = ()
    click: ClickPrompt | None = None  # of a job about one object, which has no prompts
    windows: tuple[Window, ...] = ()  # the whole picture, then its tiles
    whole: UInt8[np.ndarray, "s s 3"] | None = None  # the first one as the model takes it


class _Found(NamedTuple):
    """A picture and what the model found in each of its windows, for each prompt."""

    loaded: _Loaded
    kept: list[list[Kept]]  # filled batch by batch
    masks: list[MaskRecord] | None = None  # of everything, where that was asked for

    @property
    def complete(self) -> bool:
        return self.masks is not None or len(self.kept) == len(self.loaded.windows)


def process(
    engine: Engine, work: Iterable[Work], output: Path, settings: Settings
) -> Iterator[dict[str, Any]]:
    """Works through pictures; yields their records in order, good ones and errors.

    The other outputs of a picture are complete when its record comes.

    Args:
      engine: the model.
      work: what to do; may be endless.
      output: an existing folder.
      settings: how.

    Raises:
      RuntimeError: when the checkpoint lacks what a job needs, or the devices fail.
    """
    with (
        ThreadPoolExecutor(settings.workers, "read") as readers,
        ThreadPoolExecutor(settings.workers, "write") as finishers,
    ):
        try:
            held: dict[int, int] = {}  # bytes of the pictures under way, by their index
            loaded = _load_ahead(readers, engine, work, settings, held)
            found = _detect(readers, engine, loaded, settings)
            for record in _finish_ahead(finishers, engine, found, output, settings):
                held.pop(record["index"], None)
                yield record
        finally:
            for pool in (readers, finishers):
                pool.shutdown(wait=True, cancel_futures=True)


# ------------------------------------------------------------------------------------- reading


def _load_ahead(
    pool: ThreadPoolExecutor,
    engine: Engine,
    work: Iterable[Work],
    settings: Settings,
    held: dict[int, int],
) -> Iterator[_Loaded | dict | None]:
    """Pictures in the order of ``work``, read by threads, bounded in number and in bytes.

    None asks to bring what is under way to an end, because it holds all the memory there is.
    """
    waiting: collections.deque[Future] = collections.deque()
    limit = 2 * settings.batch_size + settings.workers
    room = _bytes_for_pictures()

    def first() -> _Loaded | dict:
        item = waiting.popleft().result()
        if isinstance(item, _Loaded) and item.image is None:
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


def _load(engine: Engine, work: Work, settings: Settings) -> _Loaded | dict:
    """Reads, checks and resizes one picture; an error record if that fails."""
    start = time.monotonic()
    job = work.job
    try:
        image = load_image(job.image)
        size = image.shape[:2]
        if settings.everything:
            return _Loaded(work, start, size, image)
        click = object_prompt(engine, job, size) if job.about_object else None
        prompts = () if click else _prompts(job)
        if prompts:  # one bad box must not fail the batch that the picture will be part of
            pad_geometry(prompts, [size] * len(prompts))
        windows = [(0, 0, *size)]
        if settings.tile and max(size) > settings.tile and prompts:
            if job.boxes:
                raise PromptError("boxes do not go with tiles, most of which do not show them")
            windows += tile_grid(size, settings.tile, settings.tile_overlap)
        whole = _model_input(engine, image, windows[0])
        if not settings.overlay and len(windows) == 1:
            image = None
        return _Loaded(work, start, size, image, prompts, click, tuple(windows), whole)
    except FAILURES as error:
        return _failed(work, error)


def _model_input(
    engine: Engine, image: UInt8[np.ndarray, "h w 3"], window: Window
) -> UInt8[np.ndarray, "s s 3"]:
    y0, x0, y1, x1 = window
    return resize_image(image[y0:y1, x0:x1], (engine.config.image_size,) * 2)


def _prompts(job: Job) -> tuple[Prompt, ...]:
    return tuple(Prompt(p, job.boxes, job.box_labels) for p in job.phrases or (None,))


def _failed(work: Work, error: BaseException) -> dict:
    name = work.job.image.as_posix()
    text = str(error).strip() or type(error).__name__
    return records.error_record(
        work.job.key, name, text.removeprefix(f"{work.job.image}: "), index=work.index
    )


# --------------------------------------------------------------------------------- the devices


class _Slot(NamedTuple):
    """One window of a picture in a batch."""

    found: _Found
    window: int


def _detect(
    pool: ThreadPoolExecutor,
    engine: Engine,
    loaded: Iterable[_Loaded | dict | None],
    settings: Settings,
) -> Iterator[_Found | dict | None]:
    """Batches of windows through the model; pictures come out in order when complete.

    None passes through behind all that came before it.
    """
    generator = _mask_generator(engine, settings)
    slots: list[_Slot] = []
    running: collections.deque[tuple[list[_Slot], list[Round]]] = collections.deque()
    order: collections.deque[_Found | dict] = collections.deque()

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

    def complete() -> Iterator[_Found | dict]:
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
            order.append(_Found(item, [], generator.generate(item.image)))
        elif item.click is not None:
            order.append(_Found(item, [[click_object(engine, item.whole[None], item.click)]]))
        else:
            order.append(_Found(item, []))
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
    return _model_input(engine, loaded.image, loaded.windows[slot.window])


def _mask_generator(engine: Engine, settings: Settings) -> AutomaticMaskGenerator | None:
    if settings.everything is None:
        return None
    return AutomaticMaskGenerator(
        ImagePredictor.from_engine(engine),
        points_per_side=settings.everything.points_per_side,
        crop_n_layers=settings.everything.crop_layers,
        output_mode="coco_rle",
    )


def _thresholds(loaded: _Loaded, settings: Settings) -> list[float]:
    own = loaded.work.job.threshold
    return [settings.threshold if own is None else own] * len(loaded.prompts)


# ------------------------------------------------------------------------------------- writing


def _finish_ahead(
    pool: ThreadPoolExecutor,
    engine: Engine,
    found: Iterable[_Found | dict | None],
    output: Path,
    settings: Settings,
) -> Iterator[dict]:
    """Records in the order of the work, made and written beside the devices' work."""
    waiting: collections.deque[Future | dict] = collections.deque()
    limit = 2 * settings.workers

    def first() -> dict:
        item = waiting.popleft()
        return item if isinstance(item, dict) else item.result()

    for item in found:
        if item is None:
            if waiting:
                yield first()
            continue
        if isinstance(item, _Found):
            item = pool.submit(_finish, engine, item, output, settings)
        waiting.append(item)
        while waiting and (
            len(waiting) > limit or isinstance(waiting[0], dict) or waiting[0].done()
        ):
            yield first()
    while waiting:
        yield first()


def _finish(engine: Engine, found: _Found, output: Path, settings: Settings) -> dict:
    """Writes the outputs of one picture and makes its record."""
    loaded = found.loaded
    work, size = loaded.work, loaded.size
    try:
        phrases = work.job.names
        annotations = []
        for i, phrase in enumerate(phrases if found.masks is None else ()):
            here = _instances(engine, [kept[i] for kept in found.kept], loaded, settings)
            annotations += [annotation(phrase, placed, size) for placed in here]
        for mask in found.masks or ():
            annotations.append(_of_everything(mask, phrases[0]))
        maps = [kept.semantic for kept in found.kept[0]] if found.kept else []
        outputs = _write(loaded, annotations, maps, output, settings)
        return records.ok_record(
            work.job.key,
            work.job.image.as_posix(),
            index=work.index,
            size=size,
            seconds=time.monotonic() - loaded.start,
            phrases=phrases,
            annotations=annotations,
            outputs=[path.relative_to(output).as_posix() for path in outputs],
        )
    except FAILURES as error:
        return _failed(work, error)


def _of_everything(mask: MaskRecord, name: str) -> dict[str, Any]:
    """A mask of the generator as a record of the results has it."""
    return {
        "phrase": name,
        "segmentation": mask["segmentation"],
        "bbox": mask["bbox"],
        "area": mask["area"],
        "score": round(mask["predicted_iou"], 6),
    }


def _instances(
    engine: Engine, windows: Sequence[Kept], loaded: _Loaded, settings: Settings
) -> Iterable[Placed]:
    """The instances of one prompt in the whole picture."""
    size = loaded.size
    tight = loaded.click is not None or engine.boxes_from_masks(settings.options)
    if len(windows) == 1:
        return place(*windows[0][:3], size, boxes_from_masks=tight)
    sizes = [(y1 - y0, x1 - x0) for y0, x0, y1, x1 in loaded.windows]
    parts = (
        detections(*kept[:3], part, boxes_from_masks=tight)
        for kept, part in zip(windows, sizes, strict=True)
    )
    merged = merge_tiles(parts, loaded.windows, size)
    return merged[: settings.options.max_instances or None]


def _write(
    loaded: _Loaded,
    annotations: list[dict],
    maps: Sequence[np.ndarray | None],
    output: Path,
    settings: Settings,
) -> list[Path]:
    """The outputs that were asked for."""
    work, size = loaded.work, loaded.size
    written = []
    if settings.overlay:
        named = bool(work.job.phrases) and settings.everything is None
        picture = loaded.image
        path = writers.write_overlay(output, work.name, picture, annotations, show_phrases=named)
        written.append(path)
    if settings.masks:
        written.append(writers.write_masks(output, work.name, annotations))
    if settings.semantic and loaded.prompts:
        named = dict(zip(work.job.names, maps, strict=True))
        written.append(writers.write_semantic(output, work.name, named, size))
    if settings.labelme:
        image = work.job.image
        written.append(writers.write_labelme(output, work.name, image, size, annotations))
    if settings.yolo:
        written.append(writers.write_yolo(output, work.name, annotations, settings.classes))
    return written
