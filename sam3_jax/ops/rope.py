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


def pairs_apart(head_dim: int) -> np.ndarray:
    """Order of a head's channels in which pairs are rotated: all first ones, then all second ones.

    Queries and keys may both be projected in another order: their products stay the same.
    """
    return np.arange(head_dim).reshape(-1, 2).T.reshape(-1)


def apply_rope(x: Float[Array, "b n h d"], rope: Rope) -> Float[Array, "b n h d"]:
    """Rotates the channel pairs of every head in float32 and returns x's dtype.

    Args:
      x: heads in the order of :func:`pairs_apart`, so that pairs are two halves. Neighbours would
        have to be moved over the fastest axis, in several passes over arrays of hundreds of MB.
    """
    cos = jnp.asarray(rope.cos)[None, :, None, :]
    sin = jnp.asarray(rope.sin)[None, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
