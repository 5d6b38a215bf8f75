"""Points and boxes of several objects on one frame, packed for the one program of a bucket.

Upstream: ``add_new_points_or_box`` (``sam3/model/sam3_tracking_predictor.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sam3_jax.models.sam_heads import PADDING
from sam3_jax.types import ClickPrompt

MAX_POINTS = 16  # of one object on one frame, corners of a box included


class ObjectClicks(NamedTuple):
    """All points of one object on one frame, in the order they were given.

    ``points`` are (x, y) pixels of the model's input frame; ``labels`` 1 on the object, 0 off it,
    2 and 3 the corners of a box, which come first. ``previous``: mask logits so far, for a
    correction.
    """

    points: Float[np.ndarray, "n 2"]
    labels: Int[np.ndarray, " n"]
    previous: Float[np.ndarray, "h w"] | None = None


def pack_clicks(
    clicks: Mapping[int, ObjectClicks], slots: int, mask_size: tuple[int, int]
) -> ClickPrompt:
    """One row a slot; slots that are not in ``clicks`` have no prompt.

    Of more than 16 points the first 8 and the last 8 count.

    Args:
      clicks: by slot.
      mask_size: (height, width) of the finest level, and of ``previous``.

    Raises:
      ValueError: where a slot does not exist, or points and labels are not as many.
    """
    points = np.zeros((slots, MAX_POINTS, 2), np.float32)
    labels = np.full((slots, MAX_POINTS), PADDING, np.int32)
    masks, has_mask = np.zeros((slots, *mask_size), np.float32), np.zeros(slots, bool)
    for slot, given in clicks.items():
        xy, marks = np.asarray(given.points, np.float32), np.asarray(given.labels, np.int32)
        if not 0 <= slot < slots:
            raise ValueError(f"slot {slot}: this bucket has slots 0 to {slots - 1}")
        if xy.shape != (len(marks), 2) or not len(marks):
            raise ValueError(
                f"slot {slot}: points of shape {xy.shape} and {len(marks)} labels; give one (x, y) "
                "and one label a point, at least one"
            )
        if len(marks) > MAX_POINTS:
            half = MAX_POINTS // 2
            xy, marks = (np.concatenate([x[:half], x[-half:]]) for x in (xy, marks))
        points[slot, : len(marks)], labels[slot, : len(marks)] = xy, marks
        if given.previous is not None:
            masks[slot], has_mask[slot] = given.previous, True
    return ClickPrompt(points, labels, masks, has_mask)
