"""Which predicted track stands for which annotated one: common to HOTA and TETA.

Both measures assign tracks frame by frame, and prefer couples that overlap in the whole video
(HOTA, arXiv 2009.07736, section 5; the code is ``sam3/eval/hota_eval_toolkit`` and
``teta_eval_toolkit`` upstream).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment

from sam3_jax.evaluation.video.overlaps import Frame, Overlaps

EPS = np.finfo(float).eps

Counts = TypeVar("Counts", bound=tuple)


class Alignment(NamedTuple):
    """How much two tracks are the same over a whole video, and in how many frames each is."""

    score: Float[np.ndarray, "G F"]
    truth_frames: Int[np.ndarray, " G"]
    found_frames: Int[np.ndarray, " F"]


def align(video: Overlaps) -> Alignment:
    """Soft count of common frames over the frames of either.

    In a frame a couple counts as its IoU divided by all IoU that either of the two has there.
    """
    shape = video.common.shape
    common, counts = np.zeros(shape), [np.zeros(n, np.int64) for n in shape]
    for frame in video.frames:
        counts[0][frame.truth] += 1
        counts[1][frame.found] += 1
        rest = frame.iou.sum(0)[None] + frame.iou.sum(1)[:, None] - frame.iou
        share = np.divide(frame.iou, rest, out=np.zeros_like(frame.iou), where=rest > EPS)
        common[np.ix_(frame.truth, frame.found)] += share
    either = counts[0][:, None] + counts[1] - common
    score = np.divide(common, either, out=np.zeros(shape), where=either > 0)
    return Alignment(score, *counts)


def assign(
    frame: Frame, alignment: Alignment
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """The assignment of one frame: annotated tracks, predicted ones, and the IoU of each couple."""
    score = alignment.score[np.ix_(frame.truth, frame.found)] * frame.iou
    rows, columns = linear_sum_assignment(score, maximize=True)
    return frame.truth[rows], frame.found[columns], frame.iou[rows, columns]


def reached(iou: Float[np.ndarray, " m"], alpha: float) -> Bool[np.ndarray, " m"]:
    """Couples that are true positives at a threshold; .15 in floating point is one of .15."""
    return iou >= alpha - EPS


class Association(NamedTuple):
    """Sums over true positives, one value a threshold; their mean is the figure."""

    accuracy: Float[np.ndarray, " a"]
    recall: Float[np.ndarray, " a"]
    precision: Float[np.ndarray, " a"]


def association(matches: Int[np.ndarray, "a G F"], alignment: Alignment) -> Association:
    """How much of its two tracks each true positive's couple shares.

    Args:
      matches: in how many frames a couple is a true positive, at each threshold.
      alignment: with the numbers of frames.
    """
    truth, found = alignment.truth_frames[:, None], alignment.found_frames
    parts = (truth + found - matches, truth, found)
    squares = matches.astype(np.float64) ** 2  # frames times frames: one share for each frame
    return Association(*((squares / np.maximum(1, part)).sum((1, 2)) for part in parts))


def total(counts: Sequence[Counts]) -> Counts:
    """Sum of counts of one kind, a NamedTuple, field by field."""
    return type(counts[0])(*(sum(values) for values in zip(*counts, strict=True)))
