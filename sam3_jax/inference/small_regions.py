"""Small holes and islands of masks."""

from __future__ import annotations

from typing import Literal

import numpy as np
import scipy.ndimage
from jaxtyping import Bool

from sam3_jax.inference.nms import boxes_of_masks


def remove_small_regions(
    mask: Bool[np.ndarray, "h w"], min_area: int, mode: Literal["holes", "islands"]
) -> tuple[Bool[np.ndarray, "h w"], bool]:
    """Fills the holes, or removes the islands, of fewer than ``min_area`` pixels.

    Regions hang together by sides or corners. Where every island is small the largest stays. What
    lies around the mask's box is no hole, however little it is.

    Returns:
      the mask, and whether it changed; without a change it is the argument.
    """
    height, width = mask.shape
    x0, y0, x1, y1 = boxes_of_masks(mask[None])[0].astype(int).tolist()
    # The box and a rim of background, where there is any.
    rim = (y0 > 0, y1 < height, x0 > 0, x1 < width)
    window = np.s_[max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1]
    inside = mask[window]
    labels, n = scipy.ndimage.label(~inside if mode == "holes" else inside, np.ones((3, 3), bool))
    areas = np.bincount(labels.ravel(), minlength=n + 1)
    small = areas < min_area
    small[0] = False  # label 0 is everything else
    if mode == "holes":
        sides = (labels[0], labels[-1], labels[:, 0], labels[:, -1])
        for side, there in zip(sides, rim, strict=True):
            if there:
                small[side] = False  # it goes on outside
    elif n and small[1:].all():
        small[1 + np.argmax(areas[1:])] = False
    if not small.any():
        return mask, False
    result = mask.copy()
    result[window] = inside ^ small[labels]
    return result, True
