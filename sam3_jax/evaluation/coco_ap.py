"""COCO's average precision, by pycocotools (upstream ``sam3/eval/coco_eval_offline.py``).

In COCO layouts every category counts by itself and the figure is their mean. In SA-Co files every
pair is an image of its own and there is one category, as upstream's evaluators with ``useCats``
off see it.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sam3_jax.data.records import Dataset, Instance
from sam3_jax.evaluation.predictions import Predictions

NAMES = (
    "AP AP50 AP75 AP_small AP_medium AP_large AR_1 AR_10 AR_100 AR_small AR_medium AR_large"
).split()


class AveragePrecision(NamedTuple):
    """Fractions; nan where there is nothing to average (no large objects, say)."""

    summary: dict[str, float]  # the twelve of COCO
    by_phrase: dict[str, float]  # AP of each category; empty for SA-Co


def average_precision(
    dataset: Dataset, predictions: Predictions, kind: str
) -> AveragePrecision | None:
    """AP and AR over IoU .50:.05:.95 of masks ("segm") or boxes ("bbox"); first annotator only.

    Pairs of images that failed are left out, and in SA-Co files those that are not exhaustive.
    Without any target there is no figure: None.
    """
    saco = dataset.layout == "saco"
    records = [
        record
        for record in dataset.records
        if record.file_name not in predictions.failed and (record.answers[0].exhaustive or not saco)
    ]
    images = _numbers(record.image_id for record in records)
    categories = _numbers(record.category_id for record in records)
    targets, found = [], []
    for record in records:
        ids = {
            "image_id": images[record.image_id],
            "category_id": categories[record.category_id],
        }
        for instance in record.answers[0].instances:
            targets.append({**ids, **_entry(instance), "area": instance.area})
        for instance in predictions.found.get(record.key, ()):
            found.append({**ids, **_entry(instance), "area": _found_area(instance, kind)})
    if not targets:
        return None
    sizes = {record.image_id: record.size for record in records}
    frame = {
        "images": [
            {"id": number, "height": sizes[i][0], "width": sizes[i][1]}
            for i, number in images.items()
        ],
        "categories": [{"id": number} for number in categories.values()],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth_coco, found_coco = COCO(), COCO()
        truth_coco.dataset = {**frame, "annotations": _numbered(targets)}
        found_coco.dataset = {**frame, "annotations": _numbered(found)}
        truth_coco.createIndex()
        found_coco.createIndex()
        evaluator = COCOeval(truth_coco, found_coco, kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    values = np.where(evaluator.stats < 0, np.nan, evaluator.stats)  # -1: nothing to average
    by_phrase = {}
    if not saco:
        phrases = {categories[record.category_id]: record.phrase for record in records}
        precision = evaluator.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, category)
        for i, category in enumerate(evaluator.params.catIds):
            if (precision[:, :, i] > -1).all():
                by_phrase[phrases[category]] = float(precision[:, :, i].mean())
    return AveragePrecision(dict(zip(NAMES, values.tolist(), strict=True)), by_phrase)


def _numbers(ids: Iterable[int | str]) -> dict[int | str, int]:
    """Ids in order -> 1, 2, ...: pycocotools wants one type, and takes 0 for "no match"."""
    return {i: n for n, i in enumerate(sorted(set(ids), key=lambda i: (isinstance(i, str), i)), 1)}


def _entry(instance: Instance) -> dict[str, Any]:
    entry = {
        "bbox": list(instance.box),
        "iscrowd": int(instance.crowd),
        "score": instance.score,
    }
    return entry if instance.rle is None else {**entry, "segmentation": instance.rle}


def _found_area(instance: Instance, kind: str) -> float:
    """By which a prediction is small, medium or large."""
    if kind == "segm":
        return float(coco_mask.area(instance.rle))
    return instance.box[2] * instance.box[3]


def _numbered(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**entry, "id": i} for i, entry in enumerate(entries, start=1)]
