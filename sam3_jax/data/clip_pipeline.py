"""From a written data set of films to batches of clips, as ``pipeline.py`` does for pictures."""

from __future__ import annotations

import functools
from pathlib import Path

import grain
import numpy as np

from sam3_jax.data.clips import Clip, ClipsConfig, collate_clips, draw_clip
from sam3_jax.data.film_source import FilmSource, open_films
from sam3_jax.data.pipeline import DataConfig, batches_of


class _Draw(grain.transforms.RandomMap):
    """Position in the data set to clip."""

    def __init__(self, source: FilmSource, config: ClipsConfig):
        self._source = source
        self._config = config

    def random_map(self, element: int, rng: np.random.Generator) -> Clip:
        return draw_clip(self._source, int(element), self._config, rng)


def make_clip_pipeline(
    config: DataConfig,
    clips: ClipsConfig,
    *,
    process_index: int = 0,
    process_count: int = 1,
    start: int = 0,
) -> grain.IterDataset:
    """Batches (:class:`sam3_jax.training.clip_batch.ClipBatch`) of this process.

    Every film comes once an epoch. Of ``config`` what belongs to pictures is not read.

    Args:
      start: number of batches to skip, at no cost.

    Raises:
      ValueError: on a configuration that contradicts itself, or less than one batch of films.
      AnnotationError: no such data set.
    """
    least = {"frames": 1, "max_stride": 1, "objects": 1, "resolution": 1, "mask_size": 1}
    for name, value in least.items():
        if getattr(clips, name) < value:
            raise ValueError(f"clips.{name}={getattr(clips, name)}: must be at least {value}")
    source = open_films(Path(config.folder), config.split)
    return batches_of(
        len(source),
        _Draw(source, clips),
        functools.partial(collate_clips, objects=clips.objects),
        config,
        process_index=process_index,
        process_count=process_count,
        start=start,
    )
