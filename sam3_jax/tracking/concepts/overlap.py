"""Overlap of binary masks on the device (upstream ``sam3/perflib/masks_ops.py``)."""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from sam3_jax.tracking.concepts.config import MEASURES

WORD = 32  # pixels that are compared at a time
ROWS = 8  # masks that are compared with all others at a time


def _pack(masks: Bool[Array, "n h w"]) -> UInt32[Array, "n words"]:
    """32 pixels a word; which ones is of no account as long as it is the same for all masks."""
    flat = rearrange(masks, "n h w -> n (h w)")
    flat = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % WORD)))
    bits = rearrange(flat, "n (bit words) -> n bit words", bit=WORD).astype(jnp.uint32)
    place = jnp.arange(WORD, dtype=jnp.uint32)[:, None]
    return jnp.sum(bits << place, axis=1, dtype=jnp.uint32)


def mask_areas(masks: Bool[Array, "n h w"]) -> Int[Array, " n"]:
    """Pixels of every mask."""
    return jnp.sum(lax.population_count(_pack(masks)), axis=1, dtype=jnp.int32)


def common_pixels(a: Bool[Array, "n h w"], b: Bool[Array, "m h w"]) -> Int[Array, "n m"]:
    """Pixels that every two masks share, counted in words of 32.

    On a CPU a fifth of the time of a matrix product of zeros and ones, and much less memory.
    """
    others = _pack(b)

    def count(words: UInt32[Array, " words"]) -> Int[Array, " m"]:
        return jnp.sum(lax.population_count(words & others), axis=1, dtype=jnp.int32)

    return lax.map(count, _pack(a), batch_size=ROWS)


def mask_overlap(
    a: Bool[Array, "n h w"], b: Bool[Array, "m h w"], measure: str = "iou"
) -> Float[Array, "n m"]:
    """Overlap of every two masks, 0 to 1; 0 with an empty one.

    ``measure``: "iou" (common over union) or "iom" (common over the smaller area).

    Raises:
      ValueError: on another measure.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")
    common = common_pixels(a, b)
    area_a, area_b = mask_areas(a)[:, None], mask_areas(b)[None]
    whole = area_a + area_b - common if measure == "iou" else jnp.minimum(area_a, area_b)
    return common.astype(jnp.float32) / jnp.maximum(whole, 1)
