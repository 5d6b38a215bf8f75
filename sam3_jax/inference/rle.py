"""Masks as COCO's compressed run lengths: ``{"size": [height, width], "counts": text}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool
from pycocotools import mask as coco_mask


def encode_mask(mask: Bool[np.ndarray, "h w"]) -> dict[str, Any]:
    """The run lengths of a mask."""
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode_mask(segmentation: Mapping[str, Any]) -> Bool[np.ndarray, "h w"]:
    """The mask of run lengths."""
    return coco_mask.decode(segmentation).view(bool)


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
