"""From a written data set to batches, by grain: shuffled, split over processes, resumable.

Everything hangs on a position in one endless global stream: the picture, by the seed's shuffle of
its epoch, and the generator of the example. Global batch number n is made of the positions from
n x size on, whatever the number of processes, workers and threads. So a run can be resumed exactly
in two ways: by the number of batches (``start``), also with other processes and workers as long as
the global batch keeps its size; or by the iterator's ``get_state()`` and ``set_state()``, with as
many workers as before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from sam3_jax.data.batch import collate
from sam3_jax.data.examples import Example, ExampleConfig, draw_example
from sam3_jax.data.source import SceneSource, open_split


@dataclass
class DataConfig:
    """Batches of one process.

    ``buckets``: numbers of target slots. A batch takes the smallest that fits, so there is a
    compiled program for each; where several processes share a step, give one, or agree with
    :func:`sam3_jax.data.batch.pad_targets`. The last must hold ``max_targets``.
    """

    folder: str = ""
    split: str = "train"
    batch_size: int = 1  # images a process
    shuffle: bool = True
    epochs: int = 0  # 0: without end
    seed: int = 0
    workers: int = 0  # processes that prepare batches; 0: this one
    threads: int = 2  # of each worker; each prepares a batch
    ahead: int = 2  # batches prepared in advance, by each worker
    buckets: tuple[int, ...] = (16, 64, 200)
    context_length: int = 32
    example: ExampleConfig = field(default_factory=ExampleConfig)


class _Draw(grain.transforms.RandomMap):
    """Position in the data set to example."""

    def __init__(self, source: SceneSource, config: ExampleConfig):
        self._source = source
        self._config = config

    def random_map(self, element: int, rng: np.random.Generator) -> Example:
        return draw_example(self._source, int(element), self._config, rng)


def make_pipeline(
    config: DataConfig, *, process_index: int = 0, process_count: int = 1, start: int = 0
) -> grain.IterDataset:
    """Batches (:class:`sam3_jax.training.batch.TrainBatch`) of this process.

    Every picture comes once an epoch, in one of the processes. An unfinished last batch is dropped.
    Close iterators that use workers when done with them (``close()``).

    Args:
      start: number of batches to skip, at no cost.

    Raises:
      ValueError: on a configuration that contradicts itself, or less than one batch of pictures.
      AnnotationError: no such data set.
    """
    _check(config)
    source = open_split(Path(config.folder), config.split)
    batching = functools.partial(
        collate,
        prompts=config.example.sampling.phrases,
        exemplars=num_exemplars(config),
        buckets=tuple(config.buckets),
        context_length=config.context_length,
    )
    return batches_of(
        len(source),
        _Draw(source, config.example),
        batching,
        config,
        process_index=process_index,
        process_count=process_count,
        start=start,
    )


def batches_of(
    length: int,
    draw: grain.transforms.RandomMap,
    batching: Callable[[Sequence[Any]], Any],
    config: DataConfig,
    *,
    process_index: int,
    process_count: int,
    start: int,
) -> grain.IterDataset:
    """The stream of batches over a data set of ``length`` entries.

    Args:
      draw: of an entry's number and a generator, an example.
      batching: of several examples, a batch.

    Raises:
      ValueError: on less than one batch.
    """
    positions = grain.MapDataset.range(length).seed(config.seed)
    if config.shuffle:
        positions = positions.shuffle()
    positions = positions.repeat(config.epochs or None)
    # Drawn before the split over processes: an example's generator depends on its global position.
    examples = positions.random_map(draw)
    batches = examples[process_index::process_count].batch(
        config.batch_size, drop_remainder=True, batch_fn=batching
    )
    if not len(batches):
        raise ValueError(
            f"{config.folder}: {len(positions)} pictures are less than one batch of "
            f"{config.batch_size} for each of {process_count} processes"
        )
    options = grain.ReadOptions(
        num_threads=config.threads, prefetch_buffer_size=max(config.threads, config.ahead)
    )
    iterable = batches[start:].to_iter_dataset(options)
    if not config.workers:
        return iterable
    if not flags.FLAGS.is_parsed():  # grain reads one of its own; absl.app parses them in train.py
        flags.FLAGS.mark_as_parsed()
    return iterable.mp_prefetch(
        grain.MultiprocessingOptions(
            num_workers=config.workers, per_worker_buffer_size=config.ahead
        )
    )


def num_exemplars(config: DataConfig) -> int:
    """Box slots of a prompt: none where no prompt gets boxes."""
    sampling = config.example.sampling
    if not (sampling.visual or sampling.boxes):
        return 0
    return sampling.max_exemplars + (sampling.negative_exemplars > 0)


def _check(config: DataConfig) -> None:
    sampling, augment = config.example.sampling, config.example.augment
    wrong = None
    if list(config.buckets) != sorted(config.buckets) or config.buckets[-1] < sampling.max_targets:
        wrong = (
            f"buckets {config.buckets} must ascend to at least max_targets={sampling.max_targets}"
        )
    elif config.example.clicks and not config.example.mask_size:
        wrong = "clicks need masks: set mask_size"
    elif not 0 < augment.min_side <= augment.max_side <= augment.resolution:
        wrong = (
            f"the sides drawn, {augment.min_side} to {augment.max_side}, must lie within the "
            f"resolution of {augment.resolution}"
        )
    elif config.batch_size < 1 or sampling.phrases < 1:
        wrong = "batch_size and phrases must be at least 1"
    if wrong:
        raise ValueError(f"data configuration: {wrong}")
