"""Overlap of predictions with targets, by mask or by box."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from pycocotools import mask as coco_mask

from sam3_jax.data.records import Instance


def ious(
    found: Sequence[Instance], truth: Sequence[Instance], kind: str
) -> Float[np.ndarray, "found truth"]:
    """Intersection over union of every prediction with every target, "segm" or "bbox"."""
    if not found or not truth:
        return np.zeros((len(found), len(truth)))
    no_crowd = [0] * len(truth)
    if kind == "bbox":
        sides = [np.asarray([i.box for i in part], np.float64) for part in (found, truth)]
    else:
        sides = [[i.rle for i in part] for part in (found, truth)]
    return np.asarray(coco_mask.iou(*sides, no_crowd))
