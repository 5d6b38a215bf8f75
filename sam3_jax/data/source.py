"""Reads the data sets that ``builder.py`` writes: a random-access sequence of scenes."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any, SupportsIndex

import tensorflow_datasets as tfds

from sam3_jax.data.records import AnnotationError, Instance, Picture
from sam3_jax.data.scenes import Pair, Scene, Vocabulary


class SceneSource:
    """The scenes of one split. Can be pickled: workers of the pipeline open the files themselves.

    Args:
      data: a TFDS data source whose images are not decoded.
      vocabulary: phrases of the split.
    """

    def __init__(self, data: Any, vocabulary: Vocabulary):
        self._data = data
        self.vocabulary = vocabulary

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: SupportsIndex) -> Scene:
        return decode_scene(self._data[operator.index(index)])


def open_split(folder: Path, split: str) -> SceneSource:
    """Opens one split of a data set's folder.

    Raises:
      AnnotationError: no such data set or split.
    """
    try:
        builder = tfds.builder_from_directory(str(folder))
    except (OSError, ValueError) as error:
        raise AnnotationError(
            f"{folder}: holds no data set written by sam3_jax.data.builder.prepare ({error})"
        ) from error
    description = (builder.info.metadata or {}).get("splits", {}).get(split)
    if description is None or split not in builder.info.splits:
        raise AnnotationError(
            f"{folder}: has no split named {split!r}; it has {', '.join(builder.info.splits)}"
        )
    data = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    vocabulary = Vocabulary(
        phrases=tuple(description["vocabulary"]["phrases"]),
        groups=tuple(description["vocabulary"]["groups"]),
        closed=description["vocabulary"]["closed"],
    )
    return SceneSource(data, vocabulary)


def decode_scene(example: dict[str, Any]) -> Scene:
    """TFDS features, as ``builder.encode_scene`` makes them, as a scene."""
    height, width = map(int, example["size"])
    found: list[list[Instance]] = [[] for _ in example["phrases"]]
    for pair, box, counts, crowd, number in zip(
        example["pair"],
        example["boxes"],
        example["masks"],
        example["crowd"],
        example["annotation_ids"],
        strict=True,
    ):
        rle = {"size": [height, width], "counts": bytes(counts)} if len(counts) else None
        box = tuple(float(v) for v in box)
        instance = Instance(box, rle, box[2] * box[3], bool(crowd), id=_text(number))
        found[pair].append(instance)
    pairs = tuple(
        Pair(_text(phrase), _text(key), tuple(instances), bool(whole), bool(pixels))
        for phrase, key, instances, whole, pixels in zip(
            example["phrases"],
            example["pair_ids"],
            found,
            example["exhaustive"],
            example["pixel_exhaustive"],
            strict=True,
        )
    )
    picture = Picture(_text(example["image_id"]), _text(example["file_name"]), (height, width))
    return Scene(picture, pairs, example["image"])


def _text(value: bytes | str) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
