"""Annotation files and pictures into array_record files, by TFDS but without TensorFlow.

COCO instances, Roboflow folders and SA-Co files become one record a picture: the bytes of its
image file, its phrases, and their targets (boxes, masks as run lengths, ids, whether they are
complete). ``tfds.builder_from_directory(folder).as_data_source(split)`` reads them, and so does
:func:`sam3_jax.data.source.open_split`.

TFDS needs TensorFlow to write ragged features and to encode or check pixels; with flat features
and images given as bytes neither writing nor reading imports it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from sam3_jax.data.annotations import MAX_BAD, annotation_file, image_path, load_annotations
from sam3_jax.data.images import ImageError
from sam3_jax.data.pictures import decode_as_annotated
from sam3_jax.data.records import AnnotationError, Instance, Problems
from sam3_jax.data.scenes import Scene, Vocabulary, scenes_of, vocabulary_of
from sam3_jax.data.shuffling import plain_files


class Source(NamedTuple):
    """One split: an annotation file or Roboflow folder, and where its pictures lie."""

    annotations: Path
    images: Path | None = None  # default: the annotation file's folder


@dataclasses.dataclass(eq=False)
class SourcesConfig(tfds.core.BuilderConfig):
    """A data set under a name of its own; ``max_bad``: share of entries that may be unusable."""

    sources: dict[str, Source] = dataclasses.field(default_factory=dict)
    max_bad: float = MAX_BAD


class Concepts(tfds.core.GeneratorBasedBuilder):
    """Pictures with phrases and their targets. Takes a :class:`SourcesConfig`."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded. (TFDS would look for a list of checksums beside this file, with a
    # package that it does not require.)
    url_infos: ClassVar[dict] = {}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Pictures with phrases and their targets.",
            features=concept_features(),
            metadata=tfds.core.MetadataDict(splits={}),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict]]]:
        del dl_manager  # nothing is downloaded
        config = self.builder_config
        return {name: self._examples(name, source) for name, source in config.sources.items()}

    def _generate_examples(self, scenes: Iterator[Scene]) -> Iterator[tuple[str, dict]]:
        for scene in scenes:
            yield str(scene.picture.image_id), encode_scene(scene)

    def _examples(self, split: str, source: Source) -> Iterator[tuple[str, dict]]:
        file = annotation_file(source.annotations)
        limit = self.builder_config.max_bad
        dataset = load_annotations([file], negatives=False, max_bad=limit, mixed=True)
        scenes, vocabulary = scenes_of(dataset), vocabulary_of(dataset)
        problems = Problems()
        yield from self._generate_examples(
            _with_images(scenes, source.images or file.parent, problems, limit)
        )
        everything = dataset.problems.found | problems.found
        _warn(str(file), [*dataset.problems.lines(), *problems.lines()])
        self.info.metadata["splits"][split] = _describe(source, vocabulary, everything)


def prepare(
    sources: Mapping[str, Source],
    folder: Path,
    name: str,
    *,
    max_bad: float = MAX_BAD,
    overwrite: bool = False,
) -> Path:
    """Writes a data set, or finds it already written from the same files; returns its folder.

    Every picture is decoded once to check it, at some 100 to 300 a second.

    Args:
      sources: of each split.
      folder: parent of all data sets.
      name: of this one.
      max_bad: largest share of entries and of pictures that may be unusable. Those are counted,
        written to stderr and, by id, to ``metadata.json``, and left out.
      overwrite: write it anew where it exists.

    Raises:
      AnnotationError: unusable files, too much damage, or a data set of that name from others.
    """
    builder = Concepts(
        config=SourcesConfig(name=name, sources=dict(sources), max_bad=max_bad),
        data_dir=folder,
        file_format="array_record",
    )
    return write_once(builder, sources, digest_of, overwrite=overwrite)


def write_once(
    builder: tfds.core.DatasetBuilder,
    sources: Mapping[str, Source],
    digest: Callable[[Source], str],
    *,
    overwrite: bool,
) -> Path:
    """Has TFDS write a data set unless it is there, from the same sources; returns its folder.

    Raises:
      AnnotationError: what writing raises, or a data set of that name from other files.
    """
    path = Path(builder.data_path)
    if path.exists() and not overwrite:
        written = (builder.info.metadata or {}).get("splits", {})
        for split, source in sources.items():
            if written.get(split, {}).get("digest") != digest(source):
                raise AnnotationError(
                    f"{path}: was written from other annotations or pictures than "
                    f"{source.annotations}; choose another name, or overwrite it"
                )
        return path
    mode = tfds.download.GenerateMode.REUSE_DATASET_IF_EXISTS
    if overwrite:
        mode = tfds.download.GenerateMode.REUSE_CACHE_IF_EXISTS
    with plain_files():
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(download_mode=mode)
        )
    return path


def digest_of(source: Source) -> str:
    """Identifies a split's annotations and the folder of its pictures."""
    file = annotation_file(source.annotations)
    try:
        content = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise AnnotationError(f"{file}: cannot be read ({error.strerror})") from error
    return f"{content} {(source.images or file.parent).resolve()}"


def concept_features() -> tfds.features.FeaturesDict:
    """What :func:`encode_scene` returns."""
    text, flags = tfds.features.Text(), tfds.features.Tensor(shape=(None,), dtype=np.bool_)
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),  # bytes of the file
            "image_id": text,
            "file_name": text,
            "size": tfds.features.Tensor(shape=(2,), dtype=np.int32),  # height, width
            "phrases": tfds.features.Sequence(text),
            "pair_ids": tfds.features.Sequence(text),
            "exhaustive": flags,
            "pixel_exhaustive": flags,
            # Of all phrases' instances; ``pair`` is the index of the phrase.
            "pair": tfds.features.Tensor(shape=(None,), dtype=np.int32),
            "boxes": tfds.features.Tensor(shape=(None, 4), dtype=np.float32),  # x, y, w, h
            "masks": tfds.features.Sequence(text),  # run lengths or nothing
            "crowd": flags,
            "annotation_ids": tfds.features.Sequence(text),
        }
    )


def encode_scene(scene: Scene) -> dict[str, Any]:
    """A scene as TFDS features, of :func:`concept_features`."""
    picture, pairs = scene.picture, scene.pairs
    found = [(number, i) for number, pair in enumerate(pairs) for i in pair.instances]
    return {
        "image": scene.data,
        "image_id": str(picture.image_id),
        "file_name": picture.file_name,
        "size": np.asarray(picture.size, np.int32),
        "phrases": [pair.phrase for pair in pairs],
        "pair_ids": [pair.pair_id for pair in pairs],
        "exhaustive": np.asarray([pair.exhaustive for pair in pairs], bool),
        "pixel_exhaustive": np.asarray([pair.pixel_exhaustive for pair in pairs], bool),
        "pair": np.asarray([number for number, _ in found], np.int32),
        "boxes": np.asarray([i.box for _, i in found], np.float32).reshape(-1, 4),
        "masks": [_counts(i) for _, i in found],
        "crowd": np.asarray([i.crowd for _, i in found], bool),
        "annotation_ids": [str(i.id) for _, i in found],
    }


def _counts(instance: Instance) -> bytes:
    return instance.rle["counts"] if instance.rle else b""


def _with_images(
    scenes: list[Scene], folder: Path, problems: Problems, limit: float
) -> Iterator[Scene]:
    """Scenes with their image files; stops as soon as too many of them are unusable."""
    for scene in scenes:  # all of them first: this is quick, and a wrong folder shows at once
        if image_path(folder, scene.picture.file_name) is None:
            problems.add("missing picture", _name(scene))
    problems.check(f"{folder} (the folder of the pictures)", len(scenes), limit)
    used = False
    for scene in scenes:
        path = image_path(folder, scene.picture.file_name)
        if path is None:
            continue
        try:
            data = path.read_bytes()
            decode_as_annotated(data, str(path), scene.picture.size)
        except (OSError, ImageError) as error:
            print(f"warning: {error}", file=sys.stderr)
            problems.add("unusable picture", _name(scene))
            problems.check(str(folder), len(scenes), limit)
            continue
        used = used or any(pair.instances for pair in scene.pairs)
        yield scene._replace(data=data)
    if not used:
        raise AnnotationError(f"{folder}: there is no picture with a target in it to learn from")


def _name(scene: Scene) -> str:
    return f"image {scene.picture.image_id} {scene.picture.file_name}"


def _describe(
    source: Source, vocabulary: Vocabulary, problems: dict[str, list[str]]
) -> dict[str, Any]:
    description = {
        "annotations": str(source.annotations),
        "digest": digest_of(source),
        "vocabulary": vocabulary._asdict(),
        "problems": problems,
    }
    return json.loads(json.dumps(description))  # tuples as lists, as they are read back


def _warn(file: str, lines: list[str]) -> None:
    for line in lines:
        print(f"warning: {file}: {line}", file=sys.stderr)
