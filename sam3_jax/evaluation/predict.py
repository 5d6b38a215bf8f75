"""Runs a predictor over the pairs of a dataset and keeps what it finds in one file."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from sam3_jax.data.annotations import image_path
from sam3_jax.data.images import ImageError
from sam3_jax.data.pictures import load_as_annotated
from sam3_jax.data.records import Dataset
from sam3_jax.inference.image import ImagePredictor
from sam3_jax.inference.prompts import Prompt
from sam3_jax.inference.records import SCHEMA_VERSION
from sam3_jax.inference.rle import encode_mask

SAVE_EVERY = 600.0  # seconds: what a killed process loses at most
GROUP = 4  # phrases that the predictor grounds together; only their full-size masks are in memory
# Of one picture: unreadable, or so large (or with so many instances) that memory ran out.
FAILURES = (ImageError, OSError, MemoryError, jax.errors.JaxRuntimeError)
Entry = dict[str, Any]


class Picture(NamedTuple):
    """What was found in one picture, as entries of a results file."""

    image: Entry
    annotations: list[Entry]  # of all phrases; their ids come when they are added


def predict_dataset(
    predictor: ImagePredictor,
    dataset: Dataset,
    images: Path,
    path: Path,
    *,
    min_score: float,
    info: Entry,
) -> int:
    """Writes ``path`` in the form of ``inference/merge.py``; one backbone pass an image.

    A picture that cannot be used is reported on stderr and in the file, and the run goes on; an
    interrupted run leaves what was done.

    Args:
      predictor: its image is replaced.
      dataset: whose pairs are predicted.
      images: folder of the pictures.
      path: of the results.
      min_score: keep instances scored above this; COCO AP wants low ones too.
      info: further facts about the run for the file.

    Returns:
      the number of pictures that failed.

    Raises:
      OSError: when the file cannot be written.
    """
    results = new_results(dataset, {**info, "threshold": min_score, "dtype": predictor.dtype.name})
    saved = time.monotonic()
    try:
        for picture in predict_pictures(predictor, dataset, images, min_score=min_score):
            add_picture(results, picture)
            if time.monotonic() - saved > SAVE_EVERY:
                _write(results, path)
                saved = time.monotonic()
    finally:
        _write(results, path)
    return sum(image["status"] == "error" for image in results["images"])


def predict_pictures(
    predictor: ImagePredictor,
    dataset: Dataset,
    images: Path,
    *,
    min_score: float,
    first: int = 0,
    every: int = 1,
) -> Iterator[Picture]:
    """The pictures one by one, or those of a share: ``first``, ``first + every`` and so on.

    One that cannot be used, or is too much for the memory, is reported on stderr and comes with its
    error instead of instances.
    """
    categories = {c["name"]: c["id"] for c in new_results(dataset, {})["categories"]}
    asked = list(enumerate(_asked(dataset).items(), start=1))[first::every]
    for number, (file_name, (size, wanted)) in tqdm(
        asked, unit="picture", dynamic_ncols=True, disable=None
    ):
        image = {"id": number, "file_name": file_name, "width": size[1], "height": size[0]}
        try:
            predictor.set_image(_load(images, file_name, size))
            found = _find(predictor, list(wanted), min_score)
        except FAILURES as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            tqdm.write(f"failed: {file_name}: {reason}", file=sys.stderr)
            yield Picture({**image, "status": "error", "error": reason}, [])
            continue
        ids = {"image_id": number}
        entries = [{**ids, "category_id": categories[phrase], **entry} for phrase, entry in found]
        yield Picture({**image, "status": "ok"}, entries)


def new_results(dataset: Dataset, info: Entry) -> Entry:
    """A results file for the phrases of ``dataset`` with nothing found yet."""
    phrases = dict.fromkeys(record.phrase for record in dataset.records)
    return {
        "schema_version": SCHEMA_VERSION,
        "info": info,
        "images": [],
        "categories": [{"id": i, "name": phrase} for i, phrase in enumerate(phrases, start=1)],
        "annotations": [],
    }


def add_picture(results: Entry, picture: Picture) -> None:
    """Appends a picture, its instances numbered on."""
    results["images"].append(picture.image)
    for number, entry in enumerate(picture.annotations, start=len(results["annotations"]) + 1):
        results["annotations"].append({"id": number, **entry})


def _asked(dataset: Dataset) -> dict[str, tuple[tuple[int, int], dict[str, None]]]:
    """Size and phrases of each picture."""
    asked: dict[str, tuple[tuple[int, int], dict[str, None]]] = {}
    for record in dataset.records:
        asked.setdefault(record.file_name, (record.size, {}))[1][record.phrase] = None
    return asked


def _load(images: Path, file_name: str, size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    file = image_path(images, file_name)
    if file is None:
        raise ImageError(f"{images / file_name}: no such file")
    return load_as_annotated(file, size)


def _find(
    predictor: ImagePredictor, phrases: Sequence[str], min_score: float
) -> list[tuple[str, Entry]]:
    """Instances of all phrases in the predictor's image, with masks run-length encoded."""
    height, width = predictor.image_size
    limits = np.asarray([width, height, width, height])
    found = []
    for start in range(0, len(phrases), GROUP):
        group = phrases[start : start + GROUP]
        results = predictor.predict_many([Prompt(phrase) for phrase in group], min_score)
        for phrase, instances in zip(group, results, strict=True):
            for mask, box, score in zip(*instances, strict=True):
                x0, y0, x1, y1 = np.clip(box, 0, limits).tolist()
                entry = {
                    "segmentation": encode_mask(mask),
                    "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "score": round(float(score), 6),
                }
                found.append((phrase, entry))
    return found


def _write(data: Entry, path: Path) -> None:
    """Replaces the file at once or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(data) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
