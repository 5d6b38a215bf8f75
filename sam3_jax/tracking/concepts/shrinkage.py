"""Masks that others take most of are kept out of the memory, on the device.

Upstream: ``_suppress_object_pw_area_shrinkage`` in ``sam3/model/sam3_tracking_predictor.py`` and
``_tracker_update_memories`` in ``sam3/model/sam3_video_base.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from sam3_jax.ops.image import resize_bilinear
from sam3_jax.tracking.concepts.overlap import mask_areas

NO_OBJECT_LOGIT = -10.0
BAND = 288  # rows of the upscaled masks at a time: 64 objects take 85 MB


class MemoryMasks(NamedTuple):
    """What the memory encoder is to see of every row of the table: see :func:`encoder_masks`."""

    logits: Float[Array, "n h w"]  # low resolution; -10 everywhere where a mask is suppressed
    capped: Bool[Array, " n"]  # once upscaled, the logits are cut off at -10


def suppress(masks: Float[Array, "n h w"], rows: Bool[Array, " n"]) -> Float[Array, "n h w"]:
    """Sets the masks of ``rows`` to -10 everywhere."""
    return jnp.where(rows[:, None, None], NO_OBJECT_LOGIT, masks)


def _row_taps(n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bilinear taps of an axis with half-pixel centres: lower and upper index, upper weight."""
    source = np.clip((np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5, 0, n_in - 1)
    low = np.floor(source).astype(np.int32)
    return low, np.minimum(low + 1, n_in - 1), (source - low).astype(np.float32)


def areas_before_and_after(
    masks: Float[Array, "n h w"],
    phrases: Int[Array, " n"],
    ids: Int[Array, " n"],
    size: tuple[int, int],
) -> tuple[Int[Array, " n"], Int[Array, " n"]]:
    """Pixels > 0 of the upscaled masks, and those of them where no mask of the phrase is stronger.

    The upscaled masks never exist as a whole. Of equal logits the lower identity takes the pixel.

    Args:
      masks: logits.
      phrases: only masks of one phrase compete.
      ids: identities; a row with a negative one is free and counts for nothing.
      size: (height, width) to upscale to, bilinearly.
    """
    height, width = masks.shape[1:]
    masks = suppress(masks.astype(jnp.float32), ids < 0)
    order = jnp.lexsort((ids, phrases))
    masks, phrases = masks[order], phrases[order]
    edge = jnp.ones(1, bool)
    differs = phrases[1:] != phrases[:-1]
    first, last = jnp.concatenate([edge, differs]), jnp.concatenate([differs, edge])

    low, high, weight = _row_taps(width, size[1])
    wide = masks[:, :, low] * (1 - weight) + masks[:, :, high] * weight
    taps = _row_taps(height, size[0])
    pad = -size[0] % BAND
    bands = [jnp.asarray(np.pad(tap, (0, pad)).reshape(-1, BAND)) for tap in taps]
    exists = jnp.asarray((np.arange(size[0] + pad) < size[0]).reshape(-1, BAND))

    def count(band: tuple[Array, ...]) -> tuple[Array, Array]:
        low, high, weight, exists = band
        weight = weight[None, :, None]
        rows = wide[:, low] * (1 - weight) + wide[:, high] * weight
        positive = (rows > 0) & exists[None, :, None]
        return mask_areas(positive), mask_areas(positive & _strongest(rows, first, last))

    before, after = lax.map(count, (*bands, exists))
    unsort = jnp.argsort(order)
    return before.sum(0)[unsort], after.sum(0)[unsort]


def _strongest(
    rows: Float[Array, "n h w"], first: Bool[Array, " n"], last: Bool[Array, " n"]
) -> Bool[Array, "n h w"]:
    """Where each is above all before it and not below any after it, between ``first`` and ``last``.

    Two passes with one map of maxima each, instead of the maxima of every phrase at once.
    """

    def above(best: Array, item: tuple[Array, Array]) -> tuple[Array, Array]:
        row, first = item
        best = jnp.where(first, -jnp.inf, best)
        return jnp.maximum(best, row), row > best

    def not_below(best: Array, item: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        row, last, wins = item
        best = jnp.where(last, -jnp.inf, best)
        return jnp.maximum(best, row), wins & (row >= best)

    nothing = jnp.full(rows.shape[1:], -jnp.inf)
    wins = lax.scan(above, nothing, (rows, first))[1]
    return lax.scan(not_below, nothing, (rows, last, wins), reverse=True)[1]


def memory_masks(
    masks: Float[Array, "n h w"],
    suppressed: Bool[Array, " n"],
    phrases: Int[Array, " n"],
    ids: Int[Array, " n"],
    *,
    shrink_ratio: float | Float[Array, ""],
    size: tuple[int, int],
) -> MemoryMasks:
    """Propagated masks after all heuristics, as the memory encoder sees them.

    An empty mask counts as shrunken, as upstream.

    Args:
      masks: cleaned logits at low resolution.
      suppressed: by recent occlusion.
      shrink_ratio: least part of a mask's area that must remain.
      size: of the memory encoder's input, 1152 x 1152 in the release.
    """
    masks = suppress(masks, suppressed)
    before, after = areas_before_and_after(masks, phrases, ids, size)
    keep = after / jnp.maximum(before, 1) >= shrink_ratio
    return MemoryMasks(masks, ~keep)


def encoder_masks(masks: MemoryMasks, size: tuple[int, int]) -> Float[Array, "n h2 w2"]:
    """Logits at the memory encoder's size; take a bucket of rows at a time, they are large.

    An object is present where its mask has a pixel > 0.
    """
    large = resize_bilinear(masks.logits.astype(jnp.float32)[..., None], size)[..., 0]
    return jnp.where(masks.capped[:, None, None], jnp.minimum(large, NO_OBJECT_LOGIT), large)
