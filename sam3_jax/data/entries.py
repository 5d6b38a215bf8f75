"""Single entries of COCO-like files: checked, in pixels."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from sam3_jax.data.masks import BrokenMaskError, mask_box, to_rle
from sam3_jax.data.records import AnnotationError, Instance

RELATIVE = 2.0  # SA-Co's boxes are fractions of the image: none of a file ends beyond this


class BadEntryError(ValueError):
    """An entry that cannot be used; its text names the kind of problem."""


def read_json(path: Path) -> Any:
    """A JSON file's content.

    Raises:
      AnnotationError: missing, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise AnnotationError(
            f"{path}: is not JSON, or is cut off ({error}); fetch or export it again"
        ) from error


def is_number(value: Any) -> bool:
    """A finite number; JSON's true is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_id(value: Any) -> bool:
    """What may identify an entry."""
    return isinstance(value, int | str) and not isinstance(value, bool)


def is_box(value: Any) -> bool:
    """Four finite numbers."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def is_phrase(value: Any) -> bool:
    """A text that says something."""
    return isinstance(value, str) and bool(value.strip())


def has_relative_boxes(entries: Sequence[Any]) -> bool:
    """Whether boxes are fractions of the image, as in SA-Co files and dumps of upstream for them.

    A file is judged as a whole: one box alone could be two pixels in a corner.
    """
    boxes = [e["bbox"] for e in entries if isinstance(e, dict) and is_box(e.get("bbox"))]
    return bool(boxes) and all(max(x + w, y + h) <= RELATIVE for x, y, w, h in boxes)


def parse_instance(
    entry: dict[str, Any], size: tuple[int, int], *, truth: bool, masks: bool, relative: bool
) -> Instance:
    """One annotation or prediction of an image of ``size`` (height, width).

    Args:
      entry: with ``segmentation``, ``bbox`` (x, y, width, height), or both; ``score``, ``iscrowd``
        and ``area`` are optional.
      size: of the image.
      truth: refuse what cannot be found: nothing of it, or nothing within the image. A prediction
        like that is a wrong one and stays.
      masks: whether a mask is needed.
      relative: whether boxes are fractions of the image.

    Raises:
      BadEntryError: when mask or box cannot be used.
    """
    if masks and not entry.get("segmentation"):
        raise BadEntryError("no mask, while others have one")
    try:
        rle = to_rle(entry["segmentation"], size) if masks else None
    except BrokenMaskError as error:
        raise BadEntryError(str(error)) from error
    box = entry.get("bbox")
    if is_box(box):
        sx, sy = (size[1], size[0]) if relative else (1, 1)
        box = tuple(float(v * s) for v, s in zip(box, (sx, sy, sx, sy), strict=True))
    elif rle is not None:
        box = mask_box(rle)
    else:
        raise BadEntryError("neither mask nor box")
    x, y, width, height = box
    if truth and rle is not None and coco_mask.area(rle) == 0:
        raise BadEntryError("mask of zero area")
    if truth and (width <= 0 or height <= 0):
        raise BadEntryError("box of zero area")
    if truth and (x >= size[1] or y >= size[0] or x + width <= 0 or y + height <= 0):
        raise BadEntryError("box outside the image")
    area = entry.get("area")
    if relative or not is_number(area) or area <= 0:
        area = coco_mask.area(rle) if rle is not None else width * height
    score = entry.get("score", 1.0)
    if not is_number(score):
        raise BadEntryError("score is not a number")
    crowd = bool(entry.get("iscrowd", entry.get("is_crowd", 0)))
    return Instance(box, rle, float(area), crowd, float(score), entry.get("id"))
