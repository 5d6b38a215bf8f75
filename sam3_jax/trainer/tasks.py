"""What a run can train: the image model on pictures, or what words mean, or the tracker on clips.

Everything else of a run is the same for all: state, mesh, checkpoints, logs, how it resumes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax

from sam3_jax.config import ModelConfig
from sam3_jax.data.clip_pipeline import make_clip_pipeline
from sam3_jax.data.film_builder import digest_of_films, prepare_films
from sam3_jax.data.film_source import open_films
from sam3_jax.data.pipeline import DataConfig, make_pipeline
from sam3_jax.data.source import open_split
from sam3_jax.trainer.clip_validation import ClipValidator
from sam3_jax.trainer.config import TrainConfig
from sam3_jax.trainer.resolve import clip_data_config, data_config, flops_per_step
from sam3_jax.trainer.start import RunError, prepare_data, written_data
from sam3_jax.trainer.validation import Validation, Validator
from sam3_jax.training.contrast import unused_by_contrast
from sam3_jax.training.contrast_step import make_contrast_step
from sam3_jax.training.optimizer import Optimizer
from sam3_jax.training.step import make_train_step, unused_parameters
from sam3_jax.training.tracker_step import make_clip_step, unused_by_clips

PICTURES, CONTRAST, TRACKER = "pictures", "contrast", "tracker"


class Judge(Protocol):
    """Figures and pictures of held-out data."""

    def run(self, params: dict, step: int) -> Validation:
        """Measures parameters; all processes must take part."""


class Task(NamedTuple):
    """The parts of a run that depend on what it trains.

    ``prepare``: the folder of the training data. ``count``: entries in it. ``data``: this process's
    pipeline. ``batches``: of (data, number of batches to skip). ``resolution``: side of the model's
    pictures. ``unused``: paths (patterns) that no loss reaches. ``flops``: of a step, or None.
    """

    prepare: Callable[[], Path]
    count: Callable[[Path], int]
    data: Callable[[Path], DataConfig]
    batches: Callable[[DataConfig, int], Iterable[Any]]
    resolution: int
    unused: tuple[str, ...]
    step: Callable[[ModelConfig, Optimizer], Callable]
    judge: Callable[[ModelConfig, Path], Judge]
    flops: Callable[[TrainConfig, DataConfig], float | None]


def task_of(config: TrainConfig) -> Task:
    """The task that a configuration names.

    Raises:
      RunError: on another name.
    """
    tasks = {PICTURES: _pictures, CONTRAST: _contrast, TRACKER: _tracker}
    if config.task not in tasks:
        raise RunError(f"task={config.task!r}: choose one of {', '.join(tasks)}")
    return tasks[config.task](config)


def _processes() -> dict[str, int]:
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def _pictures(config: TrainConfig) -> Task:
    if config.contrast.along and not config.data.example.mask_size:
        raise RunError("contrast.along finds objects by their masks: give data.example.mask_size")
    return Task(
        prepare=lambda: prepare_data(config),
        count=lambda folder: len(open_split(folder, config.data.split)),
        data=lambda folder: data_config(config, folder),
        batches=lambda data, start: make_pipeline(data, start=start, **_processes()),
        resolution=config.data.example.augment.resolution,
        unused=unused_parameters(config.loss, config.clicks),
        step=lambda model, optimizer: make_train_step(
            model,
            config.loss,
            optimizer,
            dataclasses.replace(config.step, seed=config.step.seed + config.seed),
            clicks=config.clicks,
            contrast=config.contrast,
            alpha=config.lora.alpha,
        ),
        judge=lambda model, output: Validator(
            config.valid, config.validation, model, dtype=config.step.dtype, folder=output
        ),
        flops=flops_per_step,
    )


def _contrast(config: TrainConfig) -> Task:
    """The pictures' task with another step."""
    if not config.data.example.mask_size:
        raise RunError("task=contrast finds objects by their masks: give data.example.mask_size")
    return _pictures(config)._replace(
        unused=unused_by_contrast(config.contrast),
        step=lambda model, optimizer: make_contrast_step(
            model,
            config.contrast,
            optimizer,
            dataclasses.replace(config.step, seed=config.step.seed + config.seed),
        ),
        flops=lambda config, data: None,
    )


def _tracker(config: TrainConfig) -> Task:
    return Task(
        prepare=lambda: written_data(config, digest_of_films, prepare_films, "films"),
        count=lambda folder: len(open_films(folder, config.data.split)),
        data=lambda folder: clip_data_config(config, folder),
        batches=lambda data, start: make_clip_pipeline(
            data, config.clips, start=start, **_processes()
        ),
        resolution=config.clips.resolution,
        unused=unused_by_clips(config.tracker),
        step=lambda model, optimizer: make_clip_step(
            model,
            config.tracker,
            optimizer,
            dataclasses.replace(config.step, seed=config.step.seed + config.seed),
            alpha=config.lora.alpha,
        ),
        judge=lambda model, output: ClipValidator(
            config.valid, config.validation, model, dtype=config.step.dtype, folder=output
        ),
        flops=lambda config, data: None,  # what happens to a clip is drawn: it has no one number
    )
