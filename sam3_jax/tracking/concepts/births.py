"""Which new detections become masklets: the rule between phrases and the limit of objects.

Upstream: ``_drop_new_det_with_obj_limit`` in ``sam3/model/sam3_video_base.py``; several phrases
in one pass are ours.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int


def without_collisions(
    new: Bool[np.ndarray, " d"],
    scores: Float[np.ndarray, " d"],
    phrases: Int[np.ndarray, " d"],
    between: Float[np.ndarray, "d d"],
    taken: Float[np.ndarray, " d"],
    threshold: float,
) -> Bool[np.ndarray, " d"]:
    """New detections of objects that no other phrase has: who comes first, keeps.

    Among detections of one frame the better score comes first.

    Args:
      new: candidates.
      between: overlap of every two detections.
      taken: highest overlap with a masklet of another phrase.
      threshold: an overlap of at least it is one object.
    """
    accepted = np.zeros_like(new)
    for i in np.argsort(-scores, kind="stable"):
        if new[i] and taken[i] < threshold:
            rivals = accepted & (phrases != phrases[i]) & (between[i] >= threshold)
            accepted[i] = not rivals.any()
    return accepted


def within_limit(
    new: Bool[np.ndarray, " d"], scores: Float[np.ndarray, " d"], room: int
) -> Int[np.ndarray, " k"]:
    """Indices of the detections that become objects, in the order of their identities.

    If there are more than ``room``, the best ones, best first; otherwise all as they come.
    """
    indices = np.flatnonzero(new)
    if len(indices) <= room:
        return indices
    order = np.argsort(-scores[indices], kind="stable")
    return indices[order[: max(room, 0)]]
