"""Sine positions of grids, boxes and points (upstream ``sam3/model/position_encoding.py``)."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def _divisors(dim: int, temperature: float) -> np.ndarray:
    pair = np.arange(dim, dtype=np.float32) // 2
    return np.asarray(temperature, np.float32) ** (2 * pair / np.float32(dim))


def sine(
    x: Float[Array, "*n"], dim: int, *, scale: float = 2 * math.pi, temperature: float = 10000.0
) -> Float[Array, "*n d"]:
    """Encodes positions in [0, 1] as ``dim`` interleaved sines and cosines, in float32."""
    angle = x.astype(jnp.float32)[..., None] * scale / _divisors(dim, temperature)
    both = jnp.stack([jnp.sin(angle[..., 0::2]), jnp.cos(angle[..., 1::2])], axis=-1)
    return both.reshape(*x.shape, dim)


def sine_boxes(boxes: Float[Array, "*n 4"], dim: int) -> Float[Array, "*n d4"]:
    """Sine of (cx, cy, w, h), ``dim`` channels each, in the order y, x, w, h.

    Upstream: ``gen_sineembed_for_position`` in ``sam3/model/model_misc.py``.
    """
    x, y, w, h = jnp.unstack(boxes, axis=-1)
    return jnp.concatenate([sine(v, dim) for v in (y, x, w, h)], axis=-1)


def sine_grid(height: int, width: int, dim: int) -> Float[np.ndarray, "h w d"]:
    """Position of every cell of a grid: half the channels for y, then half for x.

    Cells count from 1 and are divided by the side (+ 1e-6). A numpy constant, so that it is
    computed once, when the program is traced.
    """
    divisors = _divisors(dim // 2, 10000.0)

    def encode(n: int) -> np.ndarray:
        cell = np.arange(1, n + 1, dtype=np.float32)
        angle = (cell / (cell[-1] + np.float32(1e-6)) * np.float32(2 * math.pi))[:, None] / divisors
        both = np.stack([np.sin(angle[:, 0::2]), np.cos(angle[:, 1::2])], axis=-1)
        return both.reshape(n, dim // 2)

    y = np.broadcast_to(encode(height)[:, None], (height, width, dim // 2))
    x = np.broadcast_to(encode(width)[None, :], (height, width, dim // 2))
    return np.concatenate([y, x], axis=-1)
