"""Videos with masklets into array_record files, by TFDS but without TensorFlow.

As :mod:`sam3_jax.data.builder` does for pictures: one record a film, long ones in pieces. A record
holds the bytes of the frames' image files and run lengths of every masklet in every frame.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from sam3_jax.data.annotations import MAX_BAD
from sam3_jax.data.builder import Source, SourcesConfig, write_once
from sam3_jax.data.film_annotations import SAV_SUFFIXES, load_films
from sam3_jax.data.film_frames import with_frames
from sam3_jax.data.films import Film, Masklet, pieces
from sam3_jax.data.records import AnnotationError

PIECE = 48  # frames of a record, at most: reading a clip reads all of it
UNKNOWN = b"?"  # in place of run lengths: nobody can say
SPLITS = "splits"


class Films(tfds.core.GeneratorBasedBuilder):
    """Videos with masklets. Takes a :class:`SourcesConfig`."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos: ClassVar[dict] = {}  # nothing is downloaded

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Videos with masks of objects through time.",
            features=film_features(),
            metadata=tfds.core.MetadataDict(splits={}),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict]]]:
        del dl_manager  # nothing is downloaded
        config = self.builder_config
        return {name: self._films(name, source) for name, source in config.sources.items()}

    def _generate_examples(self, films: Iterator[Film]) -> Iterator[tuple[str, dict]]:
        for film in films:
            yield film.film_id, encode_film(film)

    def _films(self, split: str, source: Source) -> Iterator[tuple[str, dict]]:
        limit = self.builder_config.max_bad
        whole, problems = load_films(source.annotations, max_bad=limit)
        parts = [part for film in whole for part in pieces(film, PIECE)]
        yield from self._generate_examples(
            with_frames(parts, frames_folder(source), problems, limit)
        )
        for line in problems.lines():
            print(f"warning: {source.annotations}: {line}", file=sys.stderr)
        described = {
            "annotations": str(source.annotations),
            "digest": digest_of_films(source),
            "problems": problems.found,
        }
        self.info.metadata[SPLITS][split] = json.loads(json.dumps(described))


def prepare_films(
    sources: Mapping[str, Source],
    folder: Path,
    name: str,
    *,
    max_bad: float = MAX_BAD,
    overwrite: bool = False,
) -> Path:
    """Writes a data set, or finds it already written from the same files; returns its folder.

    Args:
      sources: of each split: a YouTube-VIS file or a folder in SA-V's layout, and where the frames
        lie (default: there).
      folder: parent of all data sets.
      name: of this one.
      max_bad: largest share of entries and of frames that may be unusable. Those are counted,
        written to stderr and, by id, to ``metadata.json``, and left out.
      overwrite: write it anew where it exists.

    Raises:
      AnnotationError: unusable files, too much damage, or a data set of that name from others.
    """
    builder = Films(
        config=SourcesConfig(name=name, sources=dict(sources), max_bad=max_bad),
        data_dir=folder,
        file_format="array_record",
    )
    return write_once(builder, sources, digest_of_films, overwrite=overwrite)


def frames_folder(source: Source) -> Path:
    """Where the frames lie; YouTube-VIS' own archives have them in ``JPEGImages`` beside the file.

    A folder of annotations holds them itself.
    """
    if source.images is not None:
        return source.images
    if source.annotations.is_dir():
        return source.annotations
    beside = source.annotations.parent
    return beside / "JPEGImages" if (beside / "JPEGImages").is_dir() else beside


def digest_of_films(source: Source) -> str:
    """Identifies a split's annotations (of a folder, by names and sizes) and its frames' folder."""
    path, digest = source.annotations, hashlib.sha256()
    try:
        if path.is_dir():
            for file in sorted(f for f in path.rglob("*.json") if f.name.endswith(SAV_SUFFIXES)):
                digest.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
        else:
            digest.update(path.read_bytes())
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read ({error.strerror})") from error
    return f"{digest.hexdigest()} {frames_folder(source).resolve()}"


def film_features() -> tfds.features.FeaturesDict:
    """What :func:`encode_film` returns."""
    text = tfds.features.Text()
    return tfds.features.FeaturesDict(
        {
            "film_id": text,
            "size": tfds.features.Tensor(shape=(2,), dtype=np.int32),  # height, width
            "names": tfds.features.Sequence(text),
            "frames": tfds.features.Sequence(text),  # bytes of the files
            "ids": tfds.features.Sequence(text),
            "masks": tfds.features.Sequence(text),  # run lengths, object by object; empty: none
        }
    )


def encode_film(film: Film) -> dict[str, Any]:
    """A film as TFDS features, of :func:`film_features`."""
    masks = [
        UNKNOWN if i in masklet.unknown else (mask["counts"] if mask else b"")
        for masklet in film.masklets
        for i, mask in enumerate(masklet.masks)
    ]
    return {
        "film_id": film.film_id,
        "size": np.asarray(film.size, np.int32),
        "names": list(film.names),
        "frames": list(film.data),
        "ids": [masklet.id for masklet in film.masklets],
        "masks": masks,
    }


def decode_film(example: dict[str, Any]) -> Film:
    """Inverse of :func:`encode_film`, of what TFDS reads."""
    size = tuple(map(int, example["size"]))
    frames = tuple(bytes(data) for data in example["frames"])
    counts = [bytes(value) for value in example["masks"]]
    masklets = []
    for number, name in enumerate(example["ids"]):
        own = counts[number * len(frames) : (number + 1) * len(frames)]
        unknown = frozenset(i for i, value in enumerate(own) if value == UNKNOWN)
        masks = tuple(
            {"size": list(size), "counts": value} if value and value != UNKNOWN else None
            for value in own
        )
        masklets.append(Masklet(_text(name), masks, unknown))
    names = tuple(map(_text, example["names"]))
    return Film(_text(example["film_id"]), size, names, tuple(masklets), frames)


def _text(value: bytes | str) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
