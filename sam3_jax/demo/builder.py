"""The demo's training set, by TFDS like other data sets: pictures are made, not read.

What it writes is what :mod:`sam3_jax.data.builder` writes, and ``open_split`` reads it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from tqdm import tqdm

from sam3_jax.data.builder import concept_features, encode_scene
from sam3_jax.data.records import AnnotationError
from sam3_jax.data.scenes import Scene, Vocabulary
from sam3_jax.data.shuffling import plain_files
from sam3_jax.demo.layout import SceneConfig
from sam3_jax.demo.scene import make_scene

SPLIT = "train"
CHUNK = 16  # pictures that a process makes at a time
# Things have the size that they have in whole pictures of 192 pixels. What a word means is told by
# itself and against other words: a phrase of three, of which one is wrong, says little of each.
CLOSE_UPS = {
    "words": SceneConfig(
        side=64,
        view=85,
        max_objects=3,
        positives=4,
        negatives=4,
        hard=0.3,
        # Colours and sizes are learned soon, shapes and textures take most of the time.
        words=(("shape", 0.3), ("color", 0.225), ("texture", 0.1125), ("size", 0.1125)),
    ),
}


@dataclasses.dataclass(eq=False)
class ShapesConfig(tfds.core.BuilderConfig):
    """Training pictures: how many, from which seed, made by how many processes."""

    count: int = 16000
    seed: int = 0
    scene: SceneConfig = dataclasses.field(default_factory=SceneConfig)
    workers: int = 1

    @property
    def digest(self) -> str:
        """Identifies the pictures."""
        content = [self.count, self.seed, dataclasses.asdict(self.scene)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class Shapes(tfds.core.GeneratorBasedBuilder):
    """Drawn objects on photographs, with phrases and exact masks. Takes a ShapesConfig."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos: ClassVar[dict] = {}  # nothing is downloaded

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Drawn objects on photographs, with phrases and exact masks.",
            features=concept_features(),
            metadata=tfds.core.MetadataDict(splits={}),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict]]]:
        del dl_manager  # nothing is downloaded
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict]]:
        config = self.builder_config
        scenes = make_scenes(
            config.scene, SPLIT, config.count, seed=config.seed, workers=config.workers
        )
        for scene in scenes:
            yield str(scene.picture.image_id), encode_scene(scene)
        # Only the pairs say what is not in a picture, as in SA-Co.
        vocabulary = Vocabulary((), (), closed=False)._asdict()
        described = {"vocabulary": vocabulary, "digest": config.digest, "problems": {}}
        self.info.metadata["splits"][SPLIT] = json.loads(json.dumps(described))


def make_scenes(
    config: SceneConfig, split: str, count: int, *, seed: int = 0, workers: int = 1
) -> Iterator[Scene]:
    """The first ``count`` scenes of a split in order, with a progress bar.

    With ``workers`` above 1 the calling program must be importable (``__main__`` guarded).
    """
    make = functools.partial(make_scene, config, split, seed=seed)
    bar = functools.partial(tqdm, total=count, desc=split, unit=" pictures", mininterval=1.0)
    if workers == 1:
        yield from bar(map(make, range(count)))
        return
    # "spawn": the caller may have threads, which do not survive a fork.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from bar(pool.imap(make, range(count), chunksize=CHUNK))


def write_train(folder: Path, config: ShapesConfig) -> Path:
    """Writes the training set, or finds it already written; returns ``folder``.

    It is made beside ``folder`` and moved there when it is whole, so that an interrupted run leaves
    no half of a data set.

    Raises:
      AnnotationError: the folder holds another data set.
    """
    if folder.exists():
        written = json.loads(_read(folder / "metadata.json") or "{}").get("splits", {})
        if written.get(SPLIT, {}).get("digest") != config.digest:
            raise AnnotationError(
                f"{folder}: holds something else than {config.count} pictures of seed "
                f"{config.seed} as they are made now; name another folder, or remove it"
            )
        return folder
    work = folder.with_name(f"{folder.name}.incomplete")
    shutil.rmtree(work, ignore_errors=True)
    builder = Shapes(config=config, data_dir=work, file_format="array_record")
    with plain_files():
        builder.download_and_prepare()
    Path(builder.data_path).rename(folder)
    shutil.rmtree(work)
    return folder


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
