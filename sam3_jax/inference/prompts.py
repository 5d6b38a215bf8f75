"""Prompts in pixels of the original image -> padded arrays for the model.

Sizes are padded to a few buckets, so that nothing is recompiled while prompts stay within one.
All of this is numpy on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from sam3_jax.types import ClickPrompt, Geometry, TextFeatures

Values = np.ndarray | jax.Array | Sequence[Any]  # numbers as a caller has them
Size = tuple[int, int]  # (height, width) in pixels

VISUAL = "visual"  # the phrase that stands for "no text"
BOX_BUCKETS = (0, 1, 4, 16, 64)
MASK_BUCKETS = (0, 1, 4)
BOX_FILTER = Image.Resampling.BOX
POINT_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
PROMPT_BUCKETS = (1, 4, 16, 64)  # of points that are prompts of their own
BOX_CORNERS = (2, 3)  # labels of a box's corners among points
PADDING = -2  # label of a point that is not there


class PromptError(ValueError):
    """A prompt that cannot be used; the message says what is wrong and what to do."""


class Prompt(NamedTuple):
    """A concept to find in an image: a phrase, exemplar boxes, or both.

    ``text`` may also be the features of one phrase, as ``ImagePredictor.encode_text`` gives them.
    ``boxes`` are (x0, y0, x1, y1) in pixels of the original image, ``box_labels`` 1 for "like
    this" (the default for all) and 0 for "not like this". ``masks`` are exemplars too, (n, h, w)
    true on what they show, the whole image at any resolution, with ``mask_labels``; nobody has
    trained the weights that read them, and they come with a warning.
    """

    text: str | TextFeatures | None = None
    boxes: Values = ()
    box_labels: Values | None = None
    masks: Values = ()
    mask_labels: Values | None = None


def bucket(n: int, sizes: Sequence[int]) -> int:
    """The smallest of ``sizes`` that holds ``n``; beyond them the next power of two."""
    return next((s for s in sizes if s >= n), 1 << max(n - 1, 0).bit_length())


def phrase_of(prompt: Prompt) -> str | TextFeatures:
    """The text of a prompt, "visual" when it has boxes only.

    Raises:
      PromptError: when there is neither text nor box.
    """
    if isinstance(prompt.text, TextFeatures):
        return prompt.text
    if prompt.text is None:
        if np.size(prompt.boxes) == 0 and np.size(prompt.masks) == 0:
            raise PromptError("the prompt is empty: give text, boxes, or both")
        return VISUAL
    if not isinstance(prompt.text, str) or not prompt.text.strip():
        raise PromptError(f"text must be a phrase such as 'red car', got {prompt.text!r}")
    return prompt.text


def _array(values: Values, width: int, name: str) -> Float[np.ndarray, "n w"]:
    """``values`` as n rows of ``width`` finite numbers."""
    try:
        array = np.asarray(values, np.float32)
    except (TypeError, ValueError) as error:
        raise PromptError(f"{name} must be numbers, got {values!r}") from error
    if array.size == 0:
        return np.zeros((0, width), np.float32)
    if array.ndim != 2 or array.shape[1] != width:
        raise PromptError(f"{name} must have shape (n, {width}), got {array.shape}")
    if not np.isfinite(array).all():
        raise PromptError(f"{name} must be finite, got {array.tolist()}")
    return array


def _labels(values: Values | None, n: int, name: str) -> Int[np.ndarray, " n"]:
    """``n`` labels of 0 or 1; None means all 1."""
    if values is None:
        return np.ones(n, np.int32)
    array = np.asarray(values)
    if array.shape != (n,):
        raise PromptError(f"{name} must be {n} values, one for each, got shape {array.shape}")
    if not np.isin(array, (0, 1)).all():
        raise PromptError(f"{name} must be 1 (positive) or 0 (negative), got {array.tolist()}")
    return array.astype(np.int32)


def _boxes(values: Values, size: Size, name: str) -> Float[np.ndarray, "n 4"]:
    """Boxes in pixels, checked against the image's (height, width)."""
    boxes = _array(values, 4, name)
    height, width = size
    for box in boxes:
        x0, y0, x1, y1 = box.tolist()
        if x1 <= x0 or y1 <= y0:
            raise PromptError(f"{name} must be (x0, y0, x1, y1) with x0 < x1 and y0 < y1: {box}")
        if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
            raise PromptError(f"{name}: {box} lies outside the image of {width} x {height} pixels")
    return boxes


def pad_geometry(prompts: Sequence[Prompt], sizes: Sequence[Size], mask_side: int = 1) -> Geometry:
    """Boxes and masks of several prompts, padded together.

    Args:
      prompts: of one or of several images.
      sizes: (height, width) in pixels of the original image of each prompt.
      mask_side: what exemplar masks are resized to.

    Raises:
      PromptError: on boxes, masks or labels that cannot be used.
    """
    masks = [_masks(p.masks, mask_side) for p in prompts]
    m = bucket(max(map(len, masks)), MASK_BUCKETS)
    boxes = [_boxes(p.boxes, size, "boxes") for p, size in zip(prompts, sizes, strict=True)]
    length, n = len(prompts), bucket(max(map(len, boxes)), BOX_BUCKETS)
    padded = Geometry(
        points=np.zeros((length, 0, 2), np.float32),
        point_labels=np.zeros((length, 0), np.int32),
        point_mask=np.zeros((length, 0), bool),
        boxes=np.zeros((length, n, 4), np.float32),
        box_labels=np.zeros((length, n), np.int32),
        box_mask=np.zeros((length, n), bool),
        masks=np.zeros((length, m, mask_side, mask_side), np.float32),
        mask_labels=np.zeros((length, m), np.int32),
        mask_mask=np.zeros((length, m), bool),
    )
    for i, (prompt, pixels) in enumerate(zip(prompts, boxes, strict=True)):
        scale = np.asarray(sizes[i][::-1], np.float32)
        low, high = pixels[:, :2] / scale, pixels[:, 2:] / scale
        padded.boxes[i, : len(pixels)] = np.concatenate([(low + high) / 2, high - low], axis=1)
        padded.box_labels[i, : len(pixels)] = _labels(prompt.box_labels, len(pixels), "box_labels")
        padded.box_mask[i, : len(pixels)] = True
        shown = len(masks[i])
        padded.masks[i, :shown] = masks[i]
        padded.mask_labels[i, :shown] = _labels(prompt.mask_labels, shown, "mask_labels")
        padded.mask_mask[i, :shown] = True
    return padded


def _masks(values: Values, side: int) -> Float[np.ndarray, "n s s"]:
    """Masks as the share of every cell that they cover."""
    array = np.asarray(values)
    if array.size == 0:
        return np.zeros((0, side, side), np.float32)
    if array.ndim != 3 or array.dtype != bool:
        raise PromptError(
            f"masks must be (n, h, w) of bool, got shape {array.shape} of {array.dtype}"
        )
    small = (Image.fromarray(m).convert("L").resize((side, side), BOX_FILTER) for m in array)
    return np.stack([np.asarray(picture, np.float32) / 255 for picture in small])


def click_prompt(
    points: Values | None,
    labels: Values | None,
    box: Values | None,
    mask_input: Values | None,
    *,
    size: Size,
    frame: int,
    mask_side: int,
) -> ClickPrompt:
    """Points, box and mask of one object -> a padded prompt of batch size 1.

    A box becomes two points, its corners, placed before the others.

    Args:
      points: (n, 2) pixels (x, y) of the original image.
      labels: 1 positive, 0 negative; None means all positive.
      box: (x0, y0, x1, y1) in the same pixels.
      mask_input: low-resolution logits of one mask, (side, side) or (1, side, side).
      size: (height, width) of the original image.
      frame: side of the model's input frame.
      mask_side: side of the low-resolution masks.

    Raises:
      PromptError: on a prompt without content or with unusable values.
    """
    if points is None and labels is not None:
        raise PromptError("labels were given without points")
    coordinates = _array([] if points is None else points, 2, "points")
    kinds = _labels(labels, len(coordinates), "labels")
    height, width = size
    _check_inside(coordinates, size)
    if box is not None:
        corners = _boxes(np.atleast_2d(box), size, "box")
        if len(corners) != 1:
            raise PromptError(f"one box at a time, got {len(corners)}")
        coordinates = np.concatenate([corners.reshape(2, 2), coordinates])
        kinds = np.concatenate([np.asarray(BOX_CORNERS, np.int32), kinds])
    if not len(coordinates) and mask_input is None:
        raise PromptError("the prompt is empty: give points, a box, or mask_input")

    n = bucket(len(coordinates), POINT_BUCKETS)
    padded = np.zeros((1, n, 2), np.float32)
    padded[0, : len(coordinates)] = coordinates / (width, height) * frame
    padded_kinds = np.full((1, n), PADDING, np.int32)
    padded_kinds[0, : len(kinds)] = kinds
    return ClickPrompt(
        points=padded,
        labels=padded_kinds,
        mask_input=_mask_logits(mask_input, mask_side),
        has_mask=np.asarray([mask_input is not None]),
    )


def point_prompts(points: Values, *, size: Size, frame: int, mask_side: int) -> ClickPrompt:
    """Points, each a prompt of its own -> a batch of prompts, padded to a bucket.

    Args: see :func:`click_prompt`.

    Raises:
      PromptError: on points that cannot be used.
    """
    coordinates = _array(np.atleast_2d(points), 2, "points")
    if not len(coordinates):
        raise PromptError("there are no points")
    _check_inside(coordinates, size)
    n = bucket(len(coordinates), PROMPT_BUCKETS)
    xy = np.zeros((n, 1, 2), np.float32)
    xy[: len(coordinates), 0] = coordinates / size[::-1] * frame
    return ClickPrompt(
        points=xy,
        labels=np.ones((n, 1), np.int32),
        mask_input=np.zeros((n, mask_side, mask_side), np.float32),
        has_mask=np.zeros(n, bool),
    )


def _check_inside(points: Float[np.ndarray, "n 2"], size: Size) -> None:
    height, width = size
    if ((points < 0) | (points > (width, height))).any():
        raise PromptError(
            f"points must lie on the image of {width} x {height} pixels, as (x, y): "
            f"{points.tolist()}"
        )


def _mask_logits(mask_input: Values | None, side: int) -> Float[np.ndarray, "1 s s"]:
    """One mask's logits with a batch axis, zeros without one."""
    if mask_input is None:
        return np.zeros((1, side, side), np.float32)
    logits = np.asarray(mask_input, np.float32)
    if logits.shape not in ((side, side), (1, side, side)):
        raise PromptError(
            f"mask_input must be the low_res_logits of one mask, ({side}, {side}), got "
            f"{logits.shape}; choose one, for example low_res_logits[iou.argmax()]"
        )
    if not np.isfinite(logits).all():
        raise PromptError("mask_input must be finite")
    return logits.reshape(1, side, side)
