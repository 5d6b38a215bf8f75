"""Turns what the model found in pictures into records and files, in threads."""

from __future__ import annotations

import collections
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from sam3_jax.inference import records, writers
from sam3_jax.inference.automask import MaskRecord
from sam3_jax.inference.engine import Engine
from sam3_jax.inference.instances import Kept
from sam3_jax.inference.placed import Placed, annotation, place
from sam3_jax.inference.postprocess import detections
from sam3_jax.inference.tiles import merge_tiles
from sam3_jax.inference.work import FAILURES, Found, Loaded, Settings, failed


def finish_ahead(
    pool: ThreadPoolExecutor,
    engine: Engine,
    found: Iterable[Found | dict | None],
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
        if isinstance(item, Found):
            item = pool.submit(_finish, engine, item, output, settings)
        waiting.append(item)
        while waiting and (
            len(waiting) > limit or isinstance(waiting[0], dict) or waiting[0].done()
        ):
            yield first()
    while waiting:
        yield first()


def _finish(engine: Engine, found: Found, output: Path, settings: Settings) -> dict:
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
        return failed(work, error)


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
    engine: Engine, windows: Sequence[Kept], loaded: Loaded, settings: Settings
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
    loaded: Loaded,
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
