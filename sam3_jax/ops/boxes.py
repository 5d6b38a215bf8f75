"""Box formats and the inverse sigmoid (upstream ``sam3/model/box_ops.py``, ``model_misc.py``)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def cxcywh_to_xyxy(boxes: Float[Array, "*n 4"]) -> Float[Array, "*n 4"]:
    """(centre x, centre y, width, height) to (x0, y0, x1, y1), any unit."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([centre - 0.5 * size, centre + 0.5 * size], axis=-1)


def xyxy_to_cxcywh(boxes: Float[Array, "*n 4"]) -> Float[Array, "*n 4"]:
    """(x0, y0, x1, y1) to (centre x, centre y, width, height), any unit."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([0.5 * (low + high), high - low], axis=-1)


def inverse_sigmoid(x: Float[Array, "*n"], eps: float = 1e-3) -> Float[Array, "*n"]:
    """Logit of x in [0, 1], with x and 1 - x bounded from below by ``eps``."""
    x = jnp.clip(x, 0.0, 1.0)
    return jnp.log(jnp.maximum(x, eps)) - jnp.log(jnp.maximum(1.0 - x, eps))
