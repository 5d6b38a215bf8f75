"""Masks as COCO's compressed run lengths: ``{"size": [height, width], "counts": text}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from pycocotools import mask as coco_mask


def encode_mask(mask: Bool[np.ndarray, "h w"]) -> dict[str, Any]:
    """The run lengths of a mask."""
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode_mask(segmentation: Mapping[str, Any]) -> Bool[np.ndarray, "h w"]:
    """The mask of run lengths."""
    return coco_mask.decode(segmentation).view(bool)


def decode_crop(segmentation: Mapping[str, Any]) -> tuple[Bool[np.ndarray, "h w"], int, int]:
    """The rectangle around a mask's object, and its first row and column in the picture.

    Needs memory for the rectangle only, where :func:`decode_mask` takes a byte for each pixel of
    the picture; 0 x 0 pixels for an empty mask.
    """
    height = segmentation["size"][0]
    edges = np.cumsum(_counts(segmentation["counts"]))
    starts, lasts = edges[:-1:2], edges[1::2] - 1  # first and last pixel of every run
    starts = starts[: len(lasts)]
    if not len(starts):
        return np.zeros((0, 0), bool), 0, 0
    (left, top), (right, bottom) = np.divmod(starts, height), np.divmod(lasts, height)
    x, cols = int(left[0]), int(right[-1] - left[0]) + 1
    y, rows = 0, height
    if (left == right).all():  # else a run goes through the lower edge into the next column
        y = int(top.min())
        rows = int(bottom.max()) - y + 1
    # The mask changes where a run starts and behind its last pixel; two runs may meet there.
    changes = np.zeros(rows * cols + 1, np.uint8)
    changes[(left - x) * rows + top - y] = 1
    changes[(right - x) * rows + bottom - y + 1] ^= 1
    columns = np.bitwise_xor.accumulate(changes[:-1]).view(bool).reshape(cols, rows)
    return np.ascontiguousarray(columns.T), y, x


def _counts(text: str | bytes) -> Int[np.ndarray, " n"]:
    """The run lengths that COCO's text stands for.

    Five bits a character, low ones first, 32 for "goes on", the highest bit of the last character
    being the sign; from the fourth number on they are differences to the one before the last.
    """
    data = text.encode("ascii") if isinstance(text, str) else text
    codes = np.frombuffer(data, np.uint8).astype(np.int64) - 48
    last = (codes & 32) == 0
    first = np.flatnonzero(np.concatenate([[True], last[:-1]]))[: len(codes)]
    if not len(codes):
        return np.zeros(0, np.int64)
    length = np.diff(np.append(first, len(codes)))
    place = 5 * (np.arange(len(codes)) - np.repeat(first, length))
    values = np.add.reduceat((codes & 31) << place, first)
    values -= (codes[last] >> 4 & 1) << 5 * length
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def rle_of_crop(
    mask: Bool[np.ndarray, "h w"], offset: tuple[int, int], size: tuple[int, int]
) -> dict[str, Any]:
    """COCO's compressed run lengths of a whole picture that is empty but for one crop.

    Equal to those of pycocotools for the full mask, but needs memory for the crop only.

    Args:
      mask: the crop.
      offset: (y, x) of its first pixel in the picture.
      size: (height, width) of the picture.

    Returns:
      ``{"size": [height, width], "counts": text}``.

    Raises:
      ValueError: when the crop does not lie within the picture.
    """
    (y, x), (height, width) = offset, size
    rows, cols = mask.shape
    if y < 0 or x < 0 or y + rows > height or x + cols > width:
        raise ValueError(
            f"a mask of {rows} x {cols} pixels at (y, x) = ({y}, {x}) does not lie within a "
            f"picture of {height} x {width} pixels"
        )
    # Runs go down the columns. Each column between two background pixels: its changes are the
    # starts and ends of runs, in turn.
    columns = np.zeros((cols, rows + 2), bool)
    columns[:, 1:-1] = mask.T
    changes = np.flatnonzero(columns[:, 1:] != columns[:, :-1])
    column, row = np.divmod(changes, rows + 1)
    edges = (column + x) * height + row + y
    # A run that goes on at the top of the next column ends where the next one starts.
    joined = np.flatnonzero(edges[1:-1:2] == edges[2::2])
    edges = np.delete(edges, np.concatenate([2 * joined + 1, 2 * joined + 2]))
    counts = np.diff(np.concatenate([[0], edges, [height * width]]))
    if counts[-1] == 0:
        counts = counts[:-1]  # the picture ends with the object
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}
