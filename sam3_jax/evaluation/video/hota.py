"""HOTA, higher order tracking accuracy (arXiv 2009.07736; ``hota_eval_toolkit`` upstream).

At each threshold on IoU (.05, .10, ... .95) HOTA is the geometric mean of DetA, how many of all
objects in all frames are found, and AssA, how well those found keep the identity of their track.
Every sum runs over true positives, so that counts of several videos add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sam3_jax.evaluation.video.matching import align, assign, association, reached, total
from sam3_jax.evaluation.video.overlaps import Overlaps

ALPHAS = np.arange(0.05, 0.99, 0.05)
TINY = 1e-10


class HotaCounts(NamedTuple):
    """What one video, or several, add to the figures; one value a threshold."""

    tp: Int[np.ndarray, " a"]
    fn: Int[np.ndarray, " a"]
    fp: Int[np.ndarray, " a"]
    iou: Float[np.ndarray, " a"]  # sum over true positives, as the three that follow
    association: Float[np.ndarray, " a"]
    association_recall: Float[np.ndarray, " a"]
    association_precision: Float[np.ndarray, " a"]


class Hota(NamedTuple):
    """The figures as fractions, one value a threshold; the mean is what to report."""

    hota: Float[np.ndarray, " a"]
    det_a: Float[np.ndarray, " a"]
    ass_a: Float[np.ndarray, " a"]
    det_re: Float[np.ndarray, " a"]
    det_pr: Float[np.ndarray, " a"]
    ass_re: Float[np.ndarray, " a"]
    ass_pr: Float[np.ndarray, " a"]
    loc_a: Float[np.ndarray, " a"]
    owta: Float[np.ndarray, " a"]

    def summary(self) -> dict[str, float]:
        """Means over the thresholds by their usual names."""
        names = ("HOTA", "DetA", "AssA", "DetRe", "DetPr", "AssRe", "AssPr", "LocA", "OWTA")
        return {name: float(values.mean()) for name, values in zip(names, self, strict=True)}


def count(video: Overlaps) -> HotaCounts:
    """Counts of the tracks of one class (a phrase, a category) in one video."""
    alignment, number = align(video), len(ALPHAS)
    matches = np.zeros((number, *video.common.shape), np.int64)
    iou_sum = np.zeros(number)
    for frame in video.frames:
        truth, found, iou = assign(frame, alignment)
        for a, alpha in enumerate(ALPHAS):
            good = reached(iou, alpha)
            matches[a, truth[good], found[good]] += 1
            iou_sum[a] += iou[good].sum()
    tp = matches.sum((1, 2))
    fn, fp = alignment.truth_frames.sum() - tp, alignment.found_frames.sum() - tp
    return HotaCounts(tp, fn, fp, iou_sum, *association(matches, alignment))


def figures(counts: Sequence[HotaCounts]) -> Hota:
    """The figures of all counts, at least one, together.

    Of nothing annotated and nothing predicted all are 0 but LocA, which is 1 without a match.
    """
    sums = total(counts)
    tp = sums.tp
    det_re, det_pr = tp / np.maximum(1, tp + sums.fn), tp / np.maximum(1, tp + sums.fp)
    det_a = tp / np.maximum(1, tp + sums.fn + sums.fp)
    ass_a, ass_re, ass_pr = (
        value / np.maximum(1, tp)
        for value in (sums.association, sums.association_recall, sums.association_precision)
    )
    loc_a = np.maximum(TINY, sums.iou) / np.maximum(TINY, tp)
    hota, owta = np.sqrt(det_a * ass_a), np.sqrt(det_re * ass_a)
    return Hota(hota, det_a, ass_a, det_re, det_pr, ass_re, ass_pr, loc_a, owta)
