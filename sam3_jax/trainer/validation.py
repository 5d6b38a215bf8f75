"""Figures and pictures of the validation split during a run, by the code of ``evaluate.py``.

Every process searches a share of the pictures, with the whole model on one of its devices. What
all have found goes to process 0, which measures, draws and writes; the figures go back to all. No
shared file system is needed beyond that of the pictures.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from sam3_jax.checkpoint.loading import load_dtype
from sam3_jax.checkpoint.staging import staging_folder
from sam3_jax.config import ModelConfig
from sam3_jax.data.annotations import annotation_file, check_pictures, load_annotations
from sam3_jax.data.images import ImageError
from sam3_jax.data.records import AnnotationError, Dataset, Record
from sam3_jax.evaluation.cli import MIN_SCORE
from sam3_jax.evaluation.gallery import draw_pair
from sam3_jax.evaluation.measure import Evaluation, measure
from sam3_jax.evaluation.predict import Picture, add_picture, new_results, predict_pictures
from sam3_jax.evaluation.predictions import Predictions, assign_predictions
from sam3_jax.evaluation.report import write_report
from sam3_jax.inference.engine import Engine
from sam3_jax.inference.image import ImagePredictor
from sam3_jax.inference.writers import file_part
from sam3_jax.trainer.config import SplitConfig, ValidationConfig
from sam3_jax.training.optimizer import path_of

FOLDER = "validation"  # in the run's


class Validation(NamedTuple):
    """What one validation gave. ``figures`` and ``failed`` are the same in all processes."""

    figures: dict[str, float]  # of Evaluation.metrics()
    failed: dict[str, str]  # file name -> why the picture is in no figure
    pictures: list[tuple[str, UInt8[np.ndarray, "_ _ 3"]]]  # of process 0; names stay over the run


class Validator:
    """The validation split, and one set of compiled programs for the whole run."""

    def __init__(
        self,
        split: SplitConfig,
        config: ValidationConfig,
        model: ModelConfig,
        *,
        dtype: str,
        folder: Path,
    ):
        """Reads the annotations.

        Args:
          dtype: of computation, as ``ImagePredictor`` takes it.
          folder: the run's; each validation is written below ``folder/validation``.

        Raises:
          AnnotationError: no such files, or too many unusable entries.
          ValueError: on an unknown ``dtype``.
        """
        self.dataset, self.images = _read(split, config)
        self.engine = Engine({}, model, dtype=dtype)
        self._config, self._max_bad, self._folder = config, split.max_bad, folder / FOLDER

    def run(self, params: dict, step: int) -> Validation:
        """Measures parameters, which may be spread over a mesh; all processes must take part.

        A picture that fails is reported and left out; ``metrics.json`` names it. On the devices
        nothing stays behind but the programs.

        Raises:
          CheckpointError: when the results cannot be written.
        """
        # The mesh of training, if one is in use, is none for a model on one device.
        used = jax.sharding.get_abstract_mesh().axis_names
        with jax.set_mesh(None) if used else contextlib.nullcontext():
            try:
                self.engine.replace_params(gather_params(params, self.engine.dtype))
                found = self._predict()
            finally:
                self.engine.replace_params({})
            parts = [json.loads(part) for part in exchange(json.dumps(found).encode())]
            pictures, answer = [], b""
            if jax.process_index() == 0:
                figures, failed, pictures = self._measure(step, _merge(parts))
                answer = json.dumps([figures, failed]).encode()
            figures, failed = json.loads(exchange(answer)[0])
        return Validation(figures, failed, pictures)

    def _predict(self) -> list[Picture]:
        """What is found in this process's share of the pictures."""
        found = predict_pictures(
            ImagePredictor.from_engine(self.engine),
            self.dataset,
            self.images,
            min_score=self._min_score,
            first=jax.process_index(),
            every=jax.process_count(),
        )
        return list(found)

    @property
    def _min_score(self) -> float:
        return min(MIN_SCORE, self._config.threshold)

    def _measure(
        self, step: int, found: Sequence[Picture]
    ) -> tuple[dict[str, float], dict[str, str], list]:
        """Figures, failures and pictures, and all of them in the step's folder."""
        info = {"step": step, "dtype": self.engine.dtype.name}
        results = new_results(self.dataset, {**info, "threshold": self._min_score})
        for picture in found:
            add_picture(results, picture)
        target = self._folder / f"step_{step:08d}"
        name = target / "predictions.json"
        predictions = assign_predictions(results, name, self.dataset, self._max_bad)
        evaluation = measure(self.dataset, predictions, self._config.threshold)
        pictures = self._draw(predictions, evaluation)
        text = json.dumps(results) + "\n"
        # Of a step that is repeated after a resume there is one already.
        with staging_folder(target, len(text), replace=True) as folder:
            (folder / name.name).write_text(text, encoding="utf-8")
            info |= {"predictions": name.name, "negatives": self._config.negatives}
            write_report(folder, self.dataset, predictions, evaluation, info)
            for title, pixels in pictures:
                Image.fromarray(pixels).save(folder / f"{title}.png")
        return evaluation.metrics(), predictions.failed, pictures

    def _draw(
        self, predictions: Predictions, evaluation: Evaluation
    ) -> list[tuple[str, UInt8[np.ndarray, "_ _ 3"]]]:
        drawn = []
        for number, record in enumerate(_samples(self.dataset.records, self._config.pictures)):
            found = predictions.found.get(record.key, [])
            try:
                pixels = draw_pair(record, found, evaluation, self.images)
            except ImageError as error:
                tqdm.write(f"not drawn: {error}", file=sys.stderr)
                continue
            drawn.append((f"{number:02d}_{file_part(record.phrase)}", pixels))
        return drawn


def _read(split: SplitConfig, config: ValidationConfig) -> tuple[Dataset, Path]:
    """The pairs of the first ``config.images`` pictures, and the folder of these."""
    if not split.annotations:
        raise AnnotationError(
            "no validation data: give --config.valid.annotations=FILE (COCO or SA-Co JSON, or a "
            "Roboflow folder)"
        )
    path = Path(split.annotations)
    dataset = load_annotations([path], negatives=config.negatives, max_bad=split.max_bad)
    images = Path(split.images) if split.images else annotation_file(path).parent
    if not images.is_dir():
        raise AnnotationError(f"{images}: no such folder; set --config.valid.images")
    if config.images:
        names = list(dict.fromkeys(record.file_name for record in dataset.records))
        chosen = set(names[: config.images])
        records = [record for record in dataset.records if record.file_name in chosen]
        dataset = dataset._replace(records=records)
    check_pictures(dataset, images, split.max_bad)
    return dataset, images


def _samples(records: Sequence[Record], count: int) -> list[Record]:
    """Pairs to draw, the same every time: spread over those with instances, then the others."""
    chosen: list[Record] = []
    for shown in (True, False):
        group = [r for r in records if any(a.instances for a in r.answers) == shown]
        wanted = min(count - len(chosen), len(group))
        chosen += [group[i * len(group) // wanted] for i in range(wanted)]
    return chosen


def _merge(parts: Sequence[Sequence[Sequence[Any]]]) -> list[Picture]:
    """The shares of all processes in the order of the pictures."""
    pictures = [Picture(*picture) for part in parts for picture in part]
    return sorted(pictures, key=lambda picture: picture.image["id"])


def exchange(data: bytes) -> list[bytes]:
    """What each process has given, by their index; all must call it together."""
    if jax.process_count() == 1:
        return [data]
    packed = np.frombuffer(zlib.compress(data), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(packed)))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(packed)] = packed
    rows = multihost_utils.process_allgather(padded)
    return [
        zlib.decompress(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)
    ]


def gather_params(params: dict, dtype: Any) -> dict:
    """Parameters, maybe spread over a mesh of several processes, whole on one device of this one.

    The backbones' matrices are cast as ``checkpoint.load`` does for the compute ``dtype``, which
    halves what moves and what the copy takes. What needs neither is shared with ``params``.
    """
    places = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params))
    mesh = next((place.mesh for place in places if isinstance(place, NamedSharding)), None)
    whole = _whole(mesh, jnp.dtype(dtype))(params)
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), whole) if mesh else whole


@functools.cache
def _whole(mesh: Mesh | None, dtype: jnp.dtype) -> Callable[[dict], dict]:
    """The compiled cast, whose results every device of ``mesh`` has all of."""
    wanted = None if dtype == jnp.float32 else dtype

    def cast(params: dict) -> dict:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf.astype(load_dtype(path_of(path), leaf, wanted)),
            params,
        )

    places = NamedSharding(mesh, PartitionSpec()) if mesh else None
    return jax.jit(cast, out_shardings=places)
