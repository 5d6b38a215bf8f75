"""Mask arithmetic."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def stability_score(logits: Float[Array, "*b h w"], delta: float) -> Float[Array, "*b"]:
    """IoU of the masks at thresholds +delta and -delta; 1 where the larger one is empty.

    Upstream: ``_get_stability_scores`` in ``sam3/sam/mask_decoder.py``.
    """
    inner = jnp.sum(logits > delta, axis=(-2, -1)).astype(jnp.float32)
    outer = jnp.sum(logits > -delta, axis=(-2, -1)).astype(jnp.float32)
    return jnp.where(outer > 0, inner / jnp.maximum(outer, 1.0), 1.0)
