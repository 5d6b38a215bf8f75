"""Detections of one phrase and its masklets: which is which, and which detection is new.

Upstream: ``_associate_det_trk`` in ``sam3/model/sam3_video_base.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment

from sam3_jax.tracking.concepts.config import ConceptConfig


class Matches(NamedTuple):
    """What a frame's detections say about the masklets."""

    pairs: Bool[np.ndarray, "d n"]  # overlap enough to be one thing: many to many
    unmatched: Bool[np.ndarray, " n"]  # visible, but no detection covers it
    empty: Bool[np.ndarray, " n"]
    new: Bool[np.ndarray, " d"]
    supported: Int[np.ndarray, " n"]  # by this sure detection with high overlap; -1: by none


def associate(
    config: ConceptConfig,
    overlap: Float[np.ndarray, "d n"],
    scores: Float[np.ndarray, " d"],
    areas: Int[np.ndarray, " n"],
) -> Matches:
    """Matches the detections that are kept with the masklets in use, both of one phrase.

    Of equal overlaps the first masklet wins, so give them in the order of their identities.

    Args:
      overlap: by ``config.match_measure``.
      scores: of the detections.
      areas: pixels of the masklets' masks.
    """
    detections, masklets = overlap.shape
    empty = areas == 0
    if masklets == 0:
        threshold = config.new_score if config.new_score_always else -np.inf
        return Matches(
            np.zeros((detections, 0), bool),
            np.zeros(0, bool),
            empty,
            scores >= threshold,
            np.zeros(0, np.int32),
        )
    new = (scores >= config.new_score) & ~(overlap >= config.match_overlap).any(1)
    unmatched = ~empty & ~_covered(config, overlap)
    counted = _unambiguous(overlap, config.recondition_overlap) if config.unambiguous else overlap
    supported = np.full(masklets, -1, np.int32)
    if detections:
        sure = (scores >= config.recondition_score) & ~new
        sure &= counted.max(1) >= config.recondition_overlap
        best = counted.argmax(1)
        for detection in np.flatnonzero(sure):  # of several the last one counts
            supported[best[detection]] = detection
    return Matches(counted >= config.match_overlap, unmatched, empty, new, supported)


def _covered(config: ConceptConfig, overlap: Float[np.ndarray, "d n"]) -> Bool[np.ndarray, " n"]:
    """Masklets that a detection covers by at least ``track_overlap``."""
    enough = overlap >= config.track_overlap
    if not config.one_to_one:
        return enough.any(0)
    assigned = np.zeros_like(enough)
    assigned[linear_sum_assignment(-overlap)] = True
    return (assigned & enough).any(0)


def _unambiguous(overlap: Float[np.ndarray, "d n"], threshold: float) -> Float[np.ndarray, "d n"]:
    """Zeros the rows and columns with more than one overlap of at least ``threshold``."""
    many = overlap >= threshold
    keep = (many.sum(1) <= 1)[:, None] & (many.sum(0) <= 1)[None]
    return np.where(keep, overlap, 0.0)
