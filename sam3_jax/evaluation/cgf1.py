"""cgF1, the paper's measure for finding every instance of a phrase (``sam3/eval/cgf1_eval.py``
upstream; section on metrics of arXiv 2511.16719).

cgF1 = pmF1 x IL_MCC. The first factor says how well instances are found where there are some: one
assignment a pair, of largest total IoU, then F1 of the counts of all pairs with targets, averaged
over the thresholds .50, .55, ... .95. The second says how well presence is known at the level of
images: Matthews' correlation of "anything predicted" with "anything there".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from sam3_jax.data.records import Dataset, Instance, Key, Record
from sam3_jax.evaluation.ious import ious
from sam3_jax.evaluation.predictions import Predictions

SCORE_THRESHOLD = 0.5
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
COUNT_EPS = 1e-4
IMAGE_EPS = 1e-6


class PairScore(NamedTuple):
    """One pair against one annotator."""

    targets: int
    predicted: int
    true_positives: Int[np.ndarray, " t"]  # at each IoU threshold

    @property
    def empty(self) -> bool:
        """Nothing there, nothing predicted: right, and without an F1."""
        return not self.targets and not self.predicted

    @property
    def cells(self) -> dict[str, int | float | None]:
        """Columns of a table with a row a pair; hits are counted at IoU .5."""
        hits = int(self.true_positives[0])
        return {
            "targets": self.targets,
            "predicted": self.predicted,
            "tp50": hits,
            "fp50": self.predicted - hits,
            "fn50": self.targets - hits,
            "local_F1": None if self.empty else float(self.local_f1.mean()),
        }

    @property
    def local_f1(self) -> Float[np.ndarray, " t"]:
        """F1 of this pair alone at each threshold."""
        return f1(
            self.true_positives,
            self.predicted - self.true_positives,
            self.targets - self.true_positives,
        )


class CgF1(NamedTuple):
    """All parts, as fractions (not times 100). Arrays have one value an IoU threshold."""

    pmf1: Float[np.ndarray, " t"]
    il_mcc: float
    precision: Float[np.ndarray, " t"]  # the pairs without targets included
    recall: Float[np.ndarray, " t"]
    f1: Float[np.ndarray, " t"]
    positive_precision: Float[np.ndarray, " t"]
    positive_macro_f1: Float[np.ndarray, " t"]  # over pairs with targets and predictions
    il_precision: float
    il_recall: float
    il_f1: float
    il_fpr: float
    pairs: int
    il_tp: int
    il_fp: int
    il_tn: int
    il_fn: int

    @property
    def cgf1(self) -> Float[np.ndarray, " t"]:
        """The measure itself at each threshold; the figure to report is 100 times the mean."""
        return self.pmf1 * self.il_mcc

    def summary(self) -> dict[str, float]:
        """Names as upstream's; instance figures averaged over thresholds, and at .50 and .75."""
        curves = {
            "cgF1": self.cgf1,
            "precision": self.precision,
            "recall": self.recall,
            "F1": self.f1,
            "positive_macro_F1": self.positive_macro_f1,
            "positive_micro_F1": self.pmf1,
            "positive_micro_precision": self.positive_precision,
        }
        image_level = {
            "IL_precision": self.il_precision,
            "IL_recall": self.il_recall,
            "IL_F1": self.il_f1,
            "IL_FPR": self.il_fpr,
            "IL_MCC": self.il_mcc,
        }
        at = {f"{k}@{t}": float(v[i]) for t, i in ((0.5, 0), (0.75, 5)) for k, v in curves.items()}
        return {k: float(v.mean()) for k, v in curves.items()} | image_level | at


def f1(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray) -> Float[np.ndarray, " t"]:
    """Harmonic mean of precision and recall, with upstream's guards against division by zero."""
    precision, recall = tp / (tp + fp + COUNT_EPS), tp / (tp + fn + COUNT_EPS)
    return 2 * precision * recall / (precision + recall + COUNT_EPS)


def score_pair(pair_ious: Float[np.ndarray, "predicted targets"]) -> PairScore:
    """Assigns predictions to targets once, by total IoU, and counts at every threshold."""
    predicted, targets = pair_ious.shape
    rows, columns = linear_sum_assignment(pair_ious, maximize=True)
    matched = pair_ious[rows, columns]
    hits = (matched >= IOU_THRESHOLDS[:, None]).sum(1)
    return PairScore(targets, predicted, hits)


def best_answer(scores: Sequence[PairScore]) -> int:
    """Which annotator counts: the kindest to the prediction.

    The best mean local F1, the first of equals; with nothing predicted, an annotator (the last
    one) who found nothing either.
    """
    best = 0
    for i, score in enumerate(scores[1:], start=1):
        if score.empty or (
            not scores[best].empty and score.local_f1.mean() > scores[best].local_f1.mean()
        ):
            best = i
    return best


def accumulate(scores: Iterable[PairScore]) -> CgF1:
    """The figures of many pairs, of a whole dataset or of one phrase."""
    t = len(IOU_THRESHOLDS)
    tp, fp, fn = (np.zeros(t, np.int64) for _ in range(3))
    positive_fp, macro, macro_pairs = np.zeros(t, np.int64), np.zeros(t), 0
    table = np.zeros((2, 2), np.int64)  # [has targets, has predictions]
    for score in scores:
        table[int(score.targets > 0), int(score.predicted > 0)] += 1
        wrong = score.predicted - score.true_positives
        tp += score.true_positives
        fp += wrong
        fn += score.targets - score.true_positives
        if score.targets:
            positive_fp += wrong
        if score.targets and score.predicted:
            macro += score.local_f1
            macro_pairs += 1
    (il_tn, il_fp), (il_fn, il_tp) = table.tolist()
    il_precision, il_recall = (
        il_tp / (il_tp + il_fp + IMAGE_EPS),
        il_tp / (il_tp + il_fn + IMAGE_EPS),
    )
    margins = float(il_tp + il_fp) * (il_tp + il_fn) * (il_tn + il_fp) * (il_tn + il_fn)
    return CgF1(
        pmf1=f1(tp, positive_fp, fn),
        il_mcc=(il_tp * il_tn - il_fp * il_fn) / (margins**0.5 + IMAGE_EPS),
        precision=tp / (tp + fp + COUNT_EPS),
        recall=tp / (tp + fn + COUNT_EPS),
        f1=f1(tp, fp, fn),
        positive_precision=tp / (tp + positive_fp + COUNT_EPS),
        positive_macro_f1=macro / macro_pairs if macro_pairs else np.full(t, np.nan),
        il_precision=il_precision,
        il_recall=il_recall,
        il_f1=2 * il_precision * il_recall / (il_precision + il_recall + IMAGE_EPS),
        il_fpr=il_fp / (il_fp + il_tn + IMAGE_EPS),
        pairs=int(table.sum()),
        il_tp=il_tp,
        il_fp=il_fp,
        il_tn=il_tn,
        il_fn=il_fn,
    )


def score_record(
    record: Record, found: Sequence[Instance], kind: str, threshold: float = SCORE_THRESHOLD
) -> tuple[int, PairScore]:
    """The annotator that counts and the pair's score against that one.

    Args:
      record: the pair.
      found: its predictions; those scored below ``threshold`` are left out.
      kind: IoU of masks ("segm") or of boxes ("bbox").
      threshold: on scores, inclusive.
    """
    sure = [instance for instance in found if instance.score >= threshold]
    scores = []
    for answer in record.answers:
        targets = [instance for instance in answer.instances if not instance.crowd]
        scores.append(score_pair(ious(sure, targets, kind)))
    best = best_answer(scores)
    return best, scores[best]


def score_records(
    dataset: Dataset, predictions: Predictions, kind: str, threshold: float = SCORE_THRESHOLD
) -> dict[Key, PairScore]:
    """Every pair that all annotators marked exhaustively and whose image was not a failure."""
    return {
        record.key: score_record(record, predictions.found.get(record.key, ()), kind, threshold)[1]
        for record in dataset.records
        if record.exhaustive and record.file_name not in predictions.failed
    }
