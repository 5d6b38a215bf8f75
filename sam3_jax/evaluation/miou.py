"""Intersection over union of semantic maps: all instances of a phrase as one region.

Nothing is decoded: unions and intersections are taken of run lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from sam3_jax.data.records import Dataset, Instance, Key
from sam3_jax.evaluation.cgf1 import SCORE_THRESHOLD
from sam3_jax.evaluation.predictions import Predictions


class RegionScore(NamedTuple):
    """Pixels of one pair."""

    intersection: int
    union: int
    truth: int

    @property
    def iou(self) -> float:
        """nan where neither side has a pixel."""
        return self.intersection / self.union if self.union else float("nan")


class MeanIoU(NamedTuple):
    """Fractions; nan without anything to average."""

    miou: float  # mean over phrases of pooled intersection over pooled union
    pair_iou: float  # mean over pairs that have targets
    overall_iou: float  # pooled over everything
    by_phrase: dict[str, float]


def region_score(found: Sequence[Instance], truth: Sequence[Instance]) -> RegionScore:
    """Union of the predicted masks against the union of the annotated ones."""
    sides = [[i.rle for i in part] for part in (found, truth)]
    areas = [int(coco_mask.area(coco_mask.merge(s))) if s else 0 for s in sides]
    if not all(sides):
        return RegionScore(0, sum(areas), areas[1])
    union = int(coco_mask.area(coco_mask.merge(sides[0] + sides[1])))
    return RegionScore(sum(areas) - union, union, areas[1])


def score_regions(
    dataset: Dataset, predictions: Predictions, threshold: float = SCORE_THRESHOLD
) -> dict[Key, RegionScore]:
    """Every pair whose masks cover all the phrase names, by the first annotator; crowds count."""
    scores = {}
    for record in dataset.records:
        answer = record.answers[0]
        if answer.pixel_exhaustive and record.file_name not in predictions.failed:
            found = predictions.found.get(record.key, ())
            sure = [instance for instance in found if instance.score >= threshold]
            scores[record.key] = region_score(sure, answer.instances)
    return scores


def mean_iou(dataset: Dataset, scores: dict[Key, RegionScore]) -> MeanIoU:
    """Averages of :func:`score_regions`."""
    pooled: dict[str, np.ndarray] = {}
    for record in dataset.records:
        if record.key in scores:
            pixels = pooled.setdefault(record.phrase, np.zeros(2, np.int64))
            pixels += scores[record.key][:2]
    by_phrase = {phrase: _ratio(*pixels.tolist()) for phrase, pixels in pooled.items()}
    total = sum(pooled.values(), np.zeros(2, np.int64))
    return MeanIoU(
        miou=_mean([v for v in by_phrase.values() if not np.isnan(v)]),
        pair_iou=_mean([score.iou for score in scores.values() if score.truth]),
        overall_iou=_ratio(*total.tolist()),
        by_phrase=by_phrase,
    )


def _ratio(intersection: int, union: int) -> float:
    return float(intersection / union) if union else float("nan")


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
