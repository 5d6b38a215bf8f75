"""What goes through the pipeline: settings, jobs with their names, pictures as they come along."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from sam3_jax.data.images import ImageError
from sam3_jax.inference import records
from sam3_jax.inference.automask import MaskRecord
from sam3_jax.inference.instances import Kept
from sam3_jax.inference.jobs import Job
from sam3_jax.inference.options import DEFAULTS, Options
from sam3_jax.inference.prompts import Prompt
from sam3_jax.inference.tiles import Window
from sam3_jax.types import ClickPrompt

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


class Loaded(NamedTuple):
    """A picture in memory, as the model takes it."""

    work: Work
    start: float
    size: tuple[int, int]  # height, width
    image: UInt8[np.ndarray, "h w 3"] | None  # None where it is needed no more
    prompts: tuple[Prompt, ...] = ()
    click: ClickPrompt | None = None  # of a job about one object, which has no prompts
    windows: tuple[Window, ...] = ()  # the whole picture, then its tiles
    whole: UInt8[np.ndarray, "s s 3"] | None = None  # the first one as the model takes it


class Found(NamedTuple):
    """A picture and what the model found in each of its windows, for each prompt."""

    loaded: Loaded
    kept: list[list[Kept]]  # filled batch by batch
    masks: list[MaskRecord] | None = None  # of everything, where that was asked for

    @property
    def complete(self) -> bool:
        return self.masks is not None or len(self.kept) == len(self.loaded.windows)


def failed(work: Work, error: BaseException) -> dict:
    """The record of a picture that cannot be worked on."""
    name = work.job.image.as_posix()
    text = str(error).strip() or type(error).__name__
    return records.error_record(
        work.job.key, name, text.removeprefix(f"{work.job.image}: "), index=work.index
    )
