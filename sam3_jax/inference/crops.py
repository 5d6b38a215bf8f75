"""Where automatic masks are looked for: crops of an image, and the grid of clicks in each."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Float

EDGE_TOLERANCE = 20.0  # pixels: a box as near to the edge of its crop is taken to be cut off
Box = tuple[int, int, int, int]  # (x0, y0, x1, y1), pixels, ends not included


def point_grid(side: int) -> Float[np.ndarray, "n 2"]:
    """Centres of ``side`` x ``side`` equal cells as fractions (x, y) of an image, row by row."""
    centres = (np.arange(side) + 0.5) / side
    return np.stack(np.meshgrid(centres, centres), axis=-1).reshape(-1, 2)


def crop_boxes(size: tuple[int, int], layers: int, overlap_ratio: float) -> list[tuple[Box, int]]:
    """The whole image and the crops of every layer, each with its layer's number.

    Layer 0 is the whole image; layer i has 2^i crops a side that overlap by ``overlap_ratio`` of
    the image's shorter side in layer 1 and half as much in each layer after it.

    Args:
      size: (height, width) of the image. Crops without a pixel, in tiny images, are left out.
      layers: beside layer 0.
      overlap_ratio: 0 to below 1.
    """
    height, width = size
    crops = [((0, 0, width, height), 0)]
    for layer in range(1, layers + 1):
        n = 2**layer
        overlap = int(overlap_ratio * min(size) * (2 / n))
        wide, high = (math.ceil((overlap * (n - 1) + side) / n) for side in (width, height))
        for i in range(n):
            for j in range(n):
                x, y = (wide - overlap) * i, (high - overlap) * j
                box = (x, y, min(x + wide, width), min(y + high, height))
                if box[0] < box[2] and box[1] < box[3]:
                    crops.append((box, layer))
    return crops


def near_crop_edge(
    boxes: Float[np.ndarray, "n 4"], crop: Box, size: tuple[int, int]
) -> Bool[np.ndarray, " n"]:
    """Which boxes come within 20 pixels of an edge of their crop that is not the image's edge.

    Args:
      boxes: (x0, y0, x1, y1) in pixels of the whole image.
      crop: (x0, y0, x1, y1).
      size: (height, width) of the whole image.
    """
    height, width = size
    at_crop = np.abs(boxes - np.asarray(crop)) <= EDGE_TOLERANCE
    at_image = np.abs(boxes - np.asarray([0, 0, width, height])) <= EDGE_TOLERANCE
    return (at_crop & ~at_image).any(1)
