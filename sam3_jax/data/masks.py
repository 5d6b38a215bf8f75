"""Masks and boxes of annotation files: checked, and brought into one form.

pycocotools takes most damaged run-length encodings without complaint, for a mask of other pixels,
so every mask is checked before it sees one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from pycocotools import mask as coco_mask

POLYGON_LIMIT = 10  # times the image's longer side: beyond, coordinates are taken for damage


class BrokenMaskError(ValueError):
    """A mask that cannot be used; its text names the kind of damage."""


def parse_counts(text: bytes) -> Int[np.ndarray, " n"]:
    """Run lengths of COCO's compressed form.

    Five bits a character (code minus 48), low ones first, bit 6 set when more follow, the last
    one's fifth bit is the sign; from the fourth run on, differences to the run before the last.

    Raises:
      BrokenMaskError: on characters outside the alphabet or an unfinished number.
    """
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise BrokenMaskError("broken run-length encoding")
    last = np.flatnonzero(codes & 32 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    length = last - first + 1
    if length.max() > 7:  # 35 bits: no image is that large
        raise BrokenMaskError("broken run-length encoding")
    place = np.arange(len(codes)) - np.repeat(first, length)
    values = np.add.reduceat((codes & 31) << 5 * place, first)
    values -= np.where(codes[last] & 16, 1 << 5 * length, 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def to_rle(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Polygons or run lengths, compressed or not, as checked compressed run lengths.

    Args:
      segmentation: the field of that name in a COCO file.
      size: the image's (height, width).

    Raises:
      BrokenMaskError: damaged, or of another size than the image.
    """
    if isinstance(segmentation, list):
        return _from_polygons(segmentation, size)
    if isinstance(segmentation, dict):
        return _from_counts(segmentation, size)
    raise BrokenMaskError("segmentation is neither polygons nor run lengths")


def mask_box(rle: dict[str, Any]) -> tuple[float, float, float, float]:
    """The smallest (x, y, width, height) around a mask."""
    x, y, width, height = coco_mask.toBbox(rle).tolist()
    return x, y, width, height


def decode(rles: Sequence[dict[str, Any]], size: tuple[int, int]) -> Bool[np.ndarray, "n h w"]:
    """Run lengths as masks; ``size`` counts when there are none."""
    if not rles:
        return np.zeros((0, *size), bool)
    return np.stack([coco_mask.decode(rle).astype(bool) for rle in rles])


def _from_polygons(polygons: list[Any], size: tuple[int, int]) -> dict[str, Any]:
    try:
        arrays = [np.asarray(polygon, np.float64) for polygon in polygons]
    except (TypeError, ValueError) as error:
        raise BrokenMaskError("polygon is not a list of numbers") from error
    if any(a.ndim != 1 or len(a) % 2 for a in arrays):
        raise BrokenMaskError("polygon is not a list of x, y, x, y, ...")
    if any(len(a) < 6 for a in arrays):  # pycocotools would take four numbers for a box
        raise BrokenMaskError("polygon of fewer than three points")
    if any(not np.isfinite(a).all() or np.abs(a).max() > POLYGON_LIMIT * max(size) for a in arrays):
        raise BrokenMaskError("polygon far outside the image")
    return coco_mask.merge(coco_mask.frPyObjects([a.tolist() for a in arrays], *size))


def _from_counts(segmentation: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    counts = segmentation.get("counts")
    if list(segmentation.get("size") or []) != list(size):
        raise BrokenMaskError("mask of another size than the image")
    if isinstance(counts, list):
        try:
            runs = np.asarray(counts, np.int64)
        except (TypeError, ValueError, OverflowError) as error:
            raise BrokenMaskError("broken run-length encoding") from error
    elif isinstance(counts, str) and counts.isascii():
        runs = parse_counts(counts.encode("ascii"))
    else:
        raise BrokenMaskError("broken run-length encoding")
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != size[0] * size[1]:
        raise BrokenMaskError("broken run-length encoding")
    if isinstance(counts, str):
        return {"size": list(size), "counts": counts.encode("ascii")}
    return coco_mask.frPyObjects({"size": list(size), "counts": runs.tolist()}, *size)
