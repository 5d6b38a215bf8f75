"""Runs a predictor over the pairs of a dataset and keeps what it finds in one file."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
Entry = dict[str, Any]


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
    asked, data = _plan(dataset)
    data["info"] = {**info, "threshold": min_score, "dtype": predictor.dtype.name}
    categories = {category["name"]: category["id"] for category in data["categories"]}
    failed, saved = 0, time.monotonic()
    bar = tqdm(asked.items(), unit="picture", dynamic_ncols=True, disable=None)
    try:
        for number, (file_name, (size, wanted)) in enumerate(bar, start=1):
            image = {"id": number, "file_name": file_name, "width": size[1], "height": size[0]}
            try:
                predictor.set_image(_load(images, file_name, size))
                found = _find(predictor, list(wanted), min_score)
            except (ImageError, OSError) as error:
                failed += 1
                tqdm.write(f"failed: {file_name}: {error}", file=sys.stderr)
                data["images"].append({**image, "status": "error", "error": str(error)})
                continue
            data["images"].append({**image, "status": "ok"})
            for phrase, entry in found:
                ids = {"id": len(data["annotations"]) + 1, "image_id": number}
                data["annotations"].append({**ids, "category_id": categories[phrase], **entry})
            if time.monotonic() - saved > SAVE_EVERY:
                _write(data, path)
                saved = time.monotonic()
    finally:
        _write(data, path)
    return failed


def _plan(dataset: Dataset) -> tuple[dict[str, tuple[tuple[int, int], dict[str, None]]], Entry]:
    """Size and phrases of each picture, and a results file with nothing found yet."""
    asked: dict[str, tuple[tuple[int, int], dict[str, None]]] = {}
    for record in dataset.records:
        asked.setdefault(record.file_name, (record.size, {}))[1][record.phrase] = None
    phrases = dict.fromkeys(record.phrase for record in dataset.records)
    return asked, {
        "schema_version": SCHEMA_VERSION,
        "info": {},
        "images": [],
        "categories": [{"id": i, "name": phrase} for i, phrase in enumerate(phrases, start=1)],
        "annotations": [],
    }


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
