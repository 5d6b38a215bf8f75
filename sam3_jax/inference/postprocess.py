"""From the model's raw outputs to instances in pixels of the original image.

Pure functions over numpy arrays. Thresholds and resizing follow ``sam3/model/
sam3_image_processor.py`` upstream; the filling of holes in clicked masks follows
``sam3/model/utils/sam1_utils.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Float, Int

from sam3_jax.inference.nms import boxes_of_masks

MAX_HOLE_SHARE = 256 / 288**2  # of a mask's pixels: upstream's 256 of the released 288 x 288
HOLE_FILL_LOGIT = 10.0
LOW_RES_CLAMP = 32.0  # of the logits that a click returns for refinement
ROWS_AT_A_TIME = 64  # of an upscaled mask: one block of a 4K picture stays in a CPU's cache


class Detections(NamedTuple):
    """Instances of one prompt on one image, best score first; ``len(scores)`` of them."""

    masks: Bool[np.ndarray, "n h w"]  # at the size of the original image
    boxes: Float[np.ndarray, "n 4"]  # (x0, y0, x1, y1), pixels of the original image, not clipped
    scores: Float[np.ndarray, " n"]  # probability of the instance times that of the concept


class ClickResult(NamedTuple):
    """Hypotheses for the object that was clicked on: 3, or 1 without ``multimask``."""

    masks: Bool[np.ndarray, "n h w"]  # at the size of the original image
    iou: Float[np.ndarray, " n"]  # the model's own estimate of each mask's quality
    low_res_logits: Float[np.ndarray, "n s s"]  # one of them is the next click's mask_input


def concatenate(parts: Sequence[Detections]) -> Detections:
    """The instances of several prompts on one image as one; keeps the order of ``parts``.

    Raises:
      ValueError: on no parts, because the size of the image is then unknown.
    """
    if not parts:
        raise ValueError("concatenate needs the detections of at least one prompt")
    if len(parts) == 1:
        return parts[0]  # masks of a large picture take GB: no copy where none is needed
    return Detections(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def sigmoid(x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Logistic function in float32, without overflow for large negative logits."""
    return (0.5 * (1.0 + np.tanh(0.5 * np.asarray(x, np.float64)))).astype(np.float32)


def instance_scores(
    pred_logits: Float[np.ndarray, "*p q"], presence_logits: Float[np.ndarray, "*p"] | None
) -> Float[np.ndarray, "*p q"]:
    """Probability of every query: its own times the concept's probability to be in the image.

    ``presence_logits`` None leaves the second out.
    """
    scores = sigmoid(pred_logits)
    return scores if presence_logits is None else scores * sigmoid(presence_logits)[..., None]


def select(scores: Float[np.ndarray, " q"], threshold: float) -> Int[np.ndarray, " n"]:
    """Queries scored strictly above ``threshold``, best first; ties keep the order of queries."""
    order = np.argsort(-scores, kind="stable")
    return order[scores[order] > threshold]


def boxes_to_pixels(
    boxes: Float[np.ndarray, "n 4"], size: tuple[int, int]
) -> Float[np.ndarray, "n 4"]:
    """(cx, cy, w, h) fractions -> (x0, y0, x1, y1) pixels; ``size``: the image's height, width."""
    boxes = np.asarray(boxes, np.float32)
    height, width = size
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    corners = np.concatenate([center - half, center + half], axis=-1)
    return corners * np.asarray([width, height, width, height], np.float32)


def _taps(n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bilinear taps of one axis: lower index, upper index, weight of the upper one.

    Half-pixel centres, edges repeated, no antialiasing: torch's ``interpolate(mode="bilinear",
    align_corners=False)``.
    """
    source = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    source = np.clip(source, 0, n_in - 1)
    low = np.floor(source).astype(np.intp)
    return low, np.minimum(low + 1, n_in - 1), (source - low).astype(np.float32)


def _touched(low: np.ndarray, high: np.ndarray, positive: np.ndarray) -> slice:
    """Outputs of one axis that read any input between the first and last positive one."""
    first, last = np.flatnonzero(positive)[[0, -1]]
    hit = np.flatnonzero((high >= first) & (low <= last))
    return slice(hit[0], hit[-1] + 1) if len(hit) else slice(0, 0)


def upscale_masks(
    logits: Float[np.ndarray, "n h w"], size: tuple[int, int]
) -> Bool[np.ndarray, "n height width"]:
    """Resizes mask logits bilinearly to ``size`` (height, width) and thresholds them at 0.

    Works on one mask at a time, so beside the result (a byte a pixel) it needs little.
    """
    masks = np.zeros((len(logits), *size), bool)
    for mask, low_res in zip(masks, logits, strict=True):
        crop, y, x = upscale_crop(low_res, size)
        mask[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
    return masks


def upscale_crop(
    logits: Float[np.ndarray, "h w"], size: tuple[int, int]
) -> tuple[Bool[np.ndarray, "_ _"], int, int]:
    """One mask of :func:`upscale_masks` around its object: the crop and its first row and column.

    An interpolated logit can be positive only where one of its inputs is; everything outside the
    rectangle of positive inputs is left out. The rest is computed a few rows at a time.
    """
    logits = np.asarray(logits, np.float32)
    positive = logits > 0
    if not positive.any():
        return np.zeros((0, 0), bool), 0, 0
    (y0, y1, wy), (x0, x1, wx) = (_taps(n, m) for n, m in zip(logits.shape, size, strict=True))
    rows = _touched(y0, y1, positive.any(1))
    cols = _touched(x0, x1, positive.any(0))
    left, right = logits[:, x0[cols]], logits[:, x1[cols]]
    wide = left + wx[cols] * (right - left)
    crop = np.zeros((rows.stop - rows.start, cols.stop - cols.start), bool)
    for start in range(rows.start, rows.stop, ROWS_AT_A_TIME):
        block = slice(start, min(start + ROWS_AT_A_TIME, rows.stop))
        top, bottom = wide[y0[block]], wide[y1[block]]
        here = top + wy[block, None] * (bottom - top) > 0
        crop[block.start - rows.start : block.stop - rows.start] = here
    return crop, int(rows.start), int(cols.start)


def fill_holes(
    logits: Float[np.ndarray, "n h w"], max_area: int | None = None
) -> Float[np.ndarray, "n h w"]:
    """Sets 8-connected background (logit <= 0) of at most ``max_area`` pixels a piece to +10.

    ``max_area``: default ``MAX_HOLE_SHARE``, so that a model with smaller masks keeps its holes.
    """
    filled = np.array(logits, np.float32)
    if max_area is None:
        max_area = int(MAX_HOLE_SHARE * filled[0].size) if len(filled) else 0
    for mask in filled:
        labels, _ = scipy.ndimage.label(mask <= 0, structure=np.ones((3, 3), bool))
        small = np.bincount(labels.ravel()) <= max_area
        small[0] = False  # label 0 is the foreground
        mask[small[labels]] = HOLE_FILL_LOGIT
    return filled


def detections(
    scores: Float[np.ndarray, " n"],
    boxes: Float[np.ndarray, "n 4"],
    mask_logits: Float[np.ndarray, "n h w"],
    size: tuple[int, int],
    *,
    boxes_from_masks: bool = False,
) -> Detections:
    """Kept queries (as ordered by :func:`select`) -> instances on an image of ``size``.

    ``boxes_from_masks``: tight ones around the masks instead of the predicted ``boxes``.
    """
    masks = upscale_masks(mask_logits, size)
    return Detections(
        masks=masks,
        boxes=boxes_of_masks(masks) if boxes_from_masks else boxes_to_pixels(boxes, size),
        scores=np.asarray(scores, np.float32),
    )


def click_result(
    mask_logits: Float[np.ndarray, "n s s"], iou: Float[np.ndarray, " n"], size: tuple[int, int]
) -> ClickResult:
    """The hypotheses of a click in pixels of the original image of ``size`` (height, width)."""
    return ClickResult(
        masks=upscale_masks(fill_holes(mask_logits), size),
        iou=iou,
        low_res_logits=np.clip(mask_logits, -LOW_RES_CLAMP, LOW_RES_CLAMP),
    )
