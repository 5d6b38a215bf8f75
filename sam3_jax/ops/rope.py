"""Axial rotary positions.

Upstream: ``compute_axial_cis`` in ``sam3/model/vitdet.py``, ``sam3/sam/rope.py``.

Pairs of neighbouring channels are rotated; the first half of the pairs by the column (x), the
second by the row (y). The tables are recomputed, never loaded: the complex tables that checkpoints
carry can be stale.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Rope(NamedTuple):
    """Cosines and sines per token and channel pair, float32."""

    cos: Float[Array | np.ndarray, "n f"]
    sin: Float[Array | np.ndarray, "n f"]


def axial_rope(
    height: int,
    width: int,
    head_dim: int,
    *,
    theta: float = 10000.0,
    scale_y: float = 1.0,
    scale_x: float = 1.0,
) -> Rope:
    """Tables for a row-major grid; positions are cell indices times ``scale_*``."""
    frequency = 1.0 / theta ** (np.arange(0, head_dim, 4, dtype=np.float32) / np.float32(head_dim))
    y, x = np.divmod(np.arange(height * width), width)
    x = (x.astype(np.float32) * np.float32(scale_x))[:, None] * frequency
    y = (y.astype(np.float32) * np.float32(scale_y))[:, None] * frequency
    angle = np.concatenate([x, y], axis=-1).astype(np.float32)
    return Rope(np.cos(angle), np.sin(angle))


def apply_rope(x: Float[Array, "b n h d"], rope: Rope) -> Float[Array, "b n h d"]:
    """Rotates the channel pairs of every head in float32 and returns x's dtype.

    Each channel needs its neighbour: two rolls and a choice, half the time of taking the pairs
    apart and interleaving them again on a CPU.
    """
    cos = jnp.repeat(jnp.asarray(rope.cos), 2, axis=-1)[None, :, None, :]
    sin = jnp.asarray(rope.sin)
    sin = jnp.stack([-sin, sin], axis=-1).reshape(sin.shape[0], -1)[None, :, None, :]
    y = x.astype(jnp.float32)
    first = np.arange(x.shape[-1]) % 2 == 0  # of its pair
    neighbour = jnp.where(first, jnp.roll(y, -1, axis=-1), jnp.roll(y, 1, axis=-1))
    return (y * cos + neighbour * sin).astype(x.dtype)
