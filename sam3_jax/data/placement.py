"""Where a picture lands on the canvas that the model sees: one rule for image, masks and boxes.

Every geometric augmentation here (crop, flip, resize, pad, mosaic) cuts a rectangle out of a
picture, may mirror it, and scales it onto a rectangle of the canvas. Drawn first and applied
once, they cannot disagree, and each mask is resampled once and by itself.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from sam3_jax.data.resize import resize_image

Rect = tuple[int, int, int, int]  # x0, y0, x1, y1; pixels, the last ones excluded


class Placement(NamedTuple):
    """Cut ``crop`` out of a picture, mirror it if ``flip``, scale it onto ``target``."""

    crop: Rect
    flip: bool
    target: Rect


def place_image(
    canvas: UInt8[np.ndarray, "h w 3"], image: UInt8[np.ndarray, "ih iw 3"], placement: Placement
) -> None:
    """Draws a picture onto the canvas, resized as for inference."""
    x0, y0, x1, y1 = placement.target
    canvas[y0:y1, x0:x1] = resize_image(_cut(image, placement), (y1 - y0, x1 - x0))


def place_mask(
    mask: Bool[np.ndarray, "ih iw"], placement: Placement, size: tuple[int, int]
) -> Bool[np.ndarray, "h w"]:
    """A picture's mask on a canvas of ``size``: pixels of which at least half is covered."""
    canvas = np.zeros(size, bool)
    x0, y0, x1, y1 = placement.target
    canvas[y0:y1, x0:x1] = resize_mask(_cut(mask, placement), (y1 - y0, x1 - x0))
    return canvas


def place_boxes(boxes: Float[np.ndarray, "n 4"], placement: Placement) -> Float[np.ndarray, "n 4"]:
    """A picture's boxes (x0, y0, x1, y1) on the canvas, cut at the edges of the placement.

    A box that lies outside the crop comes back without area.
    """
    cx0, cy0, cx1, cy1 = placement.crop
    x0, y0, x1, y1 = placement.target
    boxes = np.clip(boxes, [cx0, cy0, cx0, cy0], [cx1, cy1, cx1, cy1]) - [cx0, cy0, cx0, cy0]
    if placement.flip:
        boxes = [cx1 - cx0, 0, cx1 - cx0, 0] + boxes[:, [2, 1, 0, 3]] * [-1, 1, -1, 1]
    scale = np.array([(x1 - x0) / (cx1 - cx0), (y1 - y0) / (cy1 - cy0)])
    return boxes * np.tile(scale, 2) + [x0, y0, x0, y0]


def is_cut(box: Float[np.ndarray, " 4"], placement: Placement) -> bool:
    """Whether the crop removes some of a picture's box."""
    x0, y0, x1, y1 = placement.crop
    return bool(box[0] < x0 or box[1] < y0 or box[2] > x1 or box[3] > y1)


def resize_mask(mask: Bool[np.ndarray, "ih iw"], size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Antialiased bilinear, then at least .5: what upstream's resize of 0/1 integers rounds to."""
    if mask.shape == size:
        return mask
    resized = np.zeros(size, bool)
    used = mask.any(1), mask.any(0)
    if not used[0].any():
        return resized
    # Most masks are a small part of their picture.
    seen, drawn = zip(*map(_window, used, size), strict=True)
    picture = Image.fromarray(mask[seen].astype(np.uint8) * 255)
    shape = tuple(part.stop - part.start for part in drawn)
    resized[drawn] = np.asarray(picture.resize(shape[::-1], Image.Resampling.BILINEAR)) >= 128
    return resized


def _window(used: Bool[np.ndarray, " n"], length: int) -> tuple[slice, slice]:
    """Cells around those in use, and what they become of ``length``: whole numbers of both."""
    units = math.gcd(len(used), length)
    cells, outputs = len(used) // units, length // units
    (where,) = np.nonzero(used)
    # Twice the filter's: one that is cut off at the window's edge must see zeros alone.
    reach = math.ceil(2 * max(cells / outputs, 1.0)) + 1
    first = max((int(where[0]) - reach) // cells, 0)
    last = min(-(-(int(where[-1]) + 1 + reach) // cells), units)
    return slice(first * cells, last * cells), slice(first * outputs, last * outputs)


def box_of_mask(mask: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, " 4"] | None:
    """The smallest (x0, y0, x1, y1) around a mask; None for an empty one."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(columns):
        return None
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)


def _cut(pixels: np.ndarray, placement: Placement) -> np.ndarray:
    x0, y0, x1, y1 = placement.crop
    pixels = pixels[y0:y1, x0:x1]
    return np.ascontiguousarray(pixels[:, ::-1]) if placement.flip else pixels
