"""What was found in one frame of a video: objects with identities."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int


class Objects(NamedTuple):
    """The objects of a frame, ``len(ids)`` of them, in any order."""

    ids: Int[np.ndarray, " n"]  # unique in the video
    masks: Bool[np.ndarray, "n h w"]  # at the size of the frame
    boxes: Float[np.ndarray, "n 4"]  # (x0, y0, x1, y1), pixels of the frame
    scores: Float[np.ndarray, " n"]  # of the detections that they came of; 1 once clicked
    phrases: tuple[str, ...]
    tracker_scores: Float[np.ndarray, " n"]  # of this frame


def check_objects(objects: Objects, size: tuple[int, int]) -> None:
    """Raises a ValueError unless there is one of everything for each object, at the frame's size.

    Args:
      size: (height, width) of the frame.
    """
    n = len(objects.ids)
    counts = {name: len(value) for name, value in objects._asdict().items()}
    if set(counts.values()) != {n}:
        raise ValueError(f"an object has one value of each, got {counts}")
    if objects.masks.shape != (n, *size) or objects.boxes.shape != (n, 4):
        raise ValueError(
            f"masks of shape {objects.masks.shape} and boxes of shape {objects.boxes.shape} do not "
            f"fit {n} objects on a frame of {size[0]} x {size[1]} pixels"
        )
    if len(set(objects.ids.tolist())) < n:
        raise ValueError(f"ids must be unique in a frame, got {objects.ids.tolist()}")
