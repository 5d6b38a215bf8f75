"""All figures of one evaluation, with the rows behind them."""

from __future__ import annotations

import collections
import math
from typing import Any, NamedTuple

from sam3_jax.data.records import Dataset, Key
from sam3_jax.evaluation import cgf1, coco_ap, miou
from sam3_jax.evaluation.cgf1 import CgF1, PairScore
from sam3_jax.evaluation.coco_ap import AveragePrecision
from sam3_jax.evaluation.miou import MeanIoU, RegionScore
from sam3_jax.evaluation.predictions import Predictions


class Evaluation(NamedTuple):
    """Figures by kind of IoU: "segm" where ground truth and predictions have masks, and "bbox"."""

    cgf1: dict[str, CgF1]
    ap: dict[str, AveragePrecision]
    miou: MeanIoU | None
    pairs: dict[str, dict[Key, PairScore]]
    regions: dict[Key, RegionScore]
    threshold: float

    @property
    def kind(self) -> str:
        """Of the rows and of the worst cases: masks where there are any."""
        return next(iter(self.pairs))

    def metrics(self) -> dict[str, float]:
        """Flat names for a logger, ``segm/cgF1`` or ``bbox/AP50``; fractions."""
        flat = {}
        for kind, figures in self.cgf1.items():
            flat |= {f"{kind}/{name}": value for name, value in figures.summary().items()}
        for kind, figures in self.ap.items():
            flat |= {f"{kind}/{name}": value for name, value in figures.summary.items()}
        if self.miou:
            flat |= {
                "mIoU": self.miou.miou,
                "pair_IoU": self.miou.pair_iou,
                "overall_IoU": self.miou.overall_iou,
            }
        return flat


def measure(
    dataset: Dataset, predictions: Predictions, threshold: float = cgf1.SCORE_THRESHOLD
) -> Evaluation:
    """Computes everything that ground truth and predictions allow.

    Args:
      dataset: of :func:`sam3_jax.data.annotations.load_annotations`.
      predictions: for its pairs.
      threshold: lowest score of a prediction that counts in cgF1 and mIoU; AP takes all.
    """
    masks = dataset.has_masks and predictions.has_masks
    kinds = ("segm", "bbox") if masks else ("bbox",)
    pairs = {k: cgf1.score_records(dataset, predictions, k, threshold) for k in kinds}
    ap = {k: coco_ap.average_precision(dataset, predictions, k) for k in kinds}
    regions = miou.score_regions(dataset, predictions, threshold) if masks else {}
    return Evaluation(
        cgf1={k: cgf1.accumulate(scores.values()) for k, scores in pairs.items()},
        ap={k: figures for k, figures in ap.items() if figures},
        miou=miou.mean_iou(dataset, regions) if masks else None,
        pairs=pairs,
        regions=regions,
        threshold=threshold,
    )


def pair_rows(dataset: Dataset, evaluation: Evaluation) -> list[dict[str, Any]]:
    """One row a pair that was scored, in the order of the ground truth."""
    rows, scores = [], evaluation.pairs[evaluation.kind]
    for record in dataset.records:
        if (score := scores.get(record.key)) is None:
            continue
        region = evaluation.regions.get(record.key)
        rows.append(
            {
                "image_id": record.image_id,
                "file_name": record.file_name,
                "phrase": record.phrase,
                **score.cells,
                "region_IoU": region.iou if region else None,
            }
        )
    return rows


def phrase_rows(dataset: Dataset, evaluation: Evaluation) -> list[dict[str, Any]]:
    """One row a phrase, the most frequent first."""
    scores = evaluation.pairs[evaluation.kind]
    groups: dict[str, list[PairScore]] = collections.defaultdict(list)
    for record in dataset.records:
        if record.key in scores:
            groups[record.phrase].append(scores[record.key])
    ap = evaluation.ap.get(evaluation.kind)
    rows = []
    for phrase, group in groups.items():
        figures = cgf1.accumulate(group)
        positive = figures.il_tp + figures.il_fn
        rows.append(
            {
                "phrase": phrase,
                "pairs": figures.pairs,
                "positive_pairs": positive,
                "targets": sum(score.targets for score in group),
                "predicted": sum(score.predicted for score in group),
                "pmF1": float(figures.pmf1.mean()) if positive else None,
                "IL_MCC": figures.il_mcc if 0 < positive < figures.pairs else None,
                "IL_TP": figures.il_tp,
                "IL_FP": figures.il_fp,
                "IL_TN": figures.il_tn,
                "IL_FN": figures.il_fn,
                "AP": ap.by_phrase.get(phrase) if ap else None,
                "IoU": evaluation.miou.by_phrase.get(phrase) if evaluation.miou else None,
            }
        )
    return sorted(rows, key=lambda row: (-row["targets"], row["phrase"]))


def worst_pairs(dataset: Dataset, evaluation: Evaluation, count: int) -> list[Key]:
    """Pairs with the lowest local F1; of equals those with more errors at IoU .50 first."""
    order = []
    for number, (key, score) in enumerate(evaluation.pairs[evaluation.kind].items()):
        if score.empty:
            continue
        quality = float(score.local_f1.mean())
        errors = score.predicted + score.targets - 2 * int(score.true_positives[0])
        if errors or not math.isclose(quality, 1.0, abs_tol=1e-3):
            order.append((quality, -errors, number, key))
    return [key for *_, key in sorted(order, key=lambda item: item[:3])[:count]]
