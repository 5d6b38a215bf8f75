"""Overlap of every box of one set with every box of another (upstream ``model/box_ops.py``)."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from sam3_jax.ops.boxes import cxcywh_to_xyxy


class Overlap(NamedTuple):
    """Intersection over union, and its generalisation that also ranks disjoint boxes (-1..1)."""

    iou: Float[Array, "*b q n"]
    giou: Float[Array, "*b q n"]


def pairwise_overlap(a: Float[Array, "*b q 4"], b: Float[Array, "*b n 4"]) -> Overlap:
    """Overlap of boxes (cx, cy, w, h), any unit.

    A pair whose union (or hull) is empty counts 0, where upstream divides by zero: padded targets
    are such boxes, and their gradients have to be finite.
    """
    a, b = cxcywh_to_xyxy(a)[..., :, None, :], cxcywh_to_xyxy(b)[..., None, :, :]
    inner = _area(jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:]))
    hull = _area(jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:]))
    union = jnp.prod(a[..., 2:] - a[..., :2], -1) + jnp.prod(b[..., 2:] - b[..., :2], -1) - inner
    iou = _ratio(inner, union)
    return Overlap(iou, iou - _ratio(hull - union, hull))


def _area(low: Float[Array, "*n 2"], high: Float[Array, "*n 2"]) -> Float[Array, "*n"]:
    size = jnp.maximum(high - low, 0.0)
    return size[..., 0] * size[..., 1]


def _ratio(part: Float[Array, "*n"], whole: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """part / whole, 0 where ``whole`` is; the inner ``where`` keeps the gradient finite."""
    some = whole > 0
    return jnp.where(some, part / jnp.where(some, whole, 1.0), 0.0)
