"""Instances of large pictures as what they are: a small mask at some place.

A mask of a 20000 x 15000 picture takes 300 MB, and there may be hundreds; what is left of it
around its object, and COCO's run lengths of the whole, take little.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from sam3_jax.inference.postprocess import boxes_to_pixels, upscale_crop
from sam3_jax.inference.rle import rle_of_crop


class Placed(NamedTuple):
    """One instance: its mask around the object only, and where that lies in the picture."""

    mask: Bool[np.ndarray, "h w"]
    y: int  # row of the mask's first row in the picture
    x: int
    box: Float[np.ndarray, " 4"]  # (x0, y0, x1, y1), pixels of the picture, not clipped
    score: float


def place(
    scores: Float[np.ndarray, " n"],
    boxes: Float[np.ndarray, "n 4"],
    mask_logits: Float[np.ndarray, "n h w"],
    size: tuple[int, int],
    *,
    boxes_from_masks: bool = False,
) -> Iterator[Placed]:
    """The instances of ``postprocess.detections``, one at a time."""
    pixels = boxes_to_pixels(boxes, size)
    for score, box, logits in zip(scores, pixels, mask_logits, strict=True):
        mask, y, x = upscale_crop(logits, size)
        if boxes_from_masks:
            box = _tight(mask, y, x)
        yield Placed(mask, y, x, box, float(score))


def _tight(mask: Bool[np.ndarray, "h w"], y: int, x: int) -> Float[np.ndarray, " 4"]:
    cols, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(cols):
        return np.zeros(4, np.float32)
    edges = x + cols[0], y + rows[0], x + cols[-1] + 1, y + rows[-1] + 1
    return np.asarray(edges, np.float32)


def annotation(phrase: str, placed: Placed, size: tuple[int, int]) -> dict[str, Any]:
    """An instance as a record of the results has it (``records.py``); its box gets clipped."""
    height, width = size
    x0, y0, x1, y1 = np.clip(placed.box, 0, [width, height, width, height]).tolist()
    return {
        "phrase": phrase,
        "segmentation": rle_of_crop(placed.mask, (placed.y, placed.x), size),
        "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
        "area": int(placed.mask.sum()),
        "score": round(placed.score, 6),
    }
