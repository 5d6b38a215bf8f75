"""Reads the data sets that ``film_builder.py`` writes: a random-access sequence of films."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any, SupportsIndex

import tensorflow_datasets as tfds

from sam3_jax.data.film_builder import SPLITS, decode_film
from sam3_jax.data.films import Film
from sam3_jax.data.records import AnnotationError


class FilmSource:
    """The films of one split. Can be pickled: workers of the pipeline open the files themselves."""

    def __init__(self, data: Any):
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: SupportsIndex) -> Film:
        return decode_film(self._data[operator.index(index)])


def open_films(folder: Path, split: str) -> FilmSource:
    """Opens one split of a data set's folder.

    Raises:
      AnnotationError: no such data set or split, or one of pictures.
    """
    try:
        builder = tfds.builder_from_directory(str(folder))
    except (OSError, ValueError) as error:
        raise AnnotationError(
            f"{folder}: holds no data set written by sam3_jax.data.film_builder ({error})"
        ) from error
    if "frames" not in builder.info.features:
        raise AnnotationError(f"{folder}: holds pictures, the tracker trains on videos")
    if split not in (builder.info.metadata or {}).get(SPLITS, {}):
        raise AnnotationError(
            f"{folder}: has no split named {split!r}; it has {', '.join(builder.info.splits)}"
        )
    return FilmSource(builder.as_data_source(split))
