"""Focal and dice losses of matched masks in bounded memory.

Two ways to compare a predicted mask with a target of another size, upstream's ``Masks`` in
``sam3/train/loss/loss_fns.py``: the prediction resized to the target (the release), or both read at
points, most of them where the prediction is uncertain (``mask_sampling.py``; PointRend).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from sam3_jax.ops.image import resize_bilinear
from sam3_jax.ops.losses import mask_dice, mask_focal


class Pairs(NamedTuple):
    """Matched (query, target) pairs of each image, padded; ``weight`` is 0 for padding.

    Where there were more pairs than places, the others weigh more by that factor.
    """

    query: Int[Array, "p k"]
    target: Int[Array, "p k"]
    weight: Float[Array, "p k"]


class PointSampling(NamedTuple):
    """``count`` points a mask; ``importance`` of them the most uncertain of oversample x count."""

    count: int = 12544
    oversample: float = 3.0
    importance: float = 0.75


def select_pairs(
    matched: Bool[Array, "p q n"], per_target: int, limit: int, key: PRNGKeyArray | None
) -> Pairs:
    """Lists the pairs of a matching, at most ``limit`` an image, valid ones first.

    Args:
      per_target: most queries that a target has in ``matched``.
      limit: where more are possible, ``key`` draws those to keep.

    Raises:
      ValueError: where ``key`` is needed and None.
    """
    per_target = min(per_target, matched.shape[1])
    found, query = _largest(jnp.swapaxes(matched, 1, 2), per_target)
    target = jnp.broadcast_to(jnp.arange(matched.shape[2])[:, None], query.shape)
    valid, query, target = (x.reshape(len(matched), -1) for x in (found, query, target))
    priority = valid.astype(jnp.float32)
    size = min(limit, valid.shape[1])
    if size < valid.shape[1]:
        if key is None:
            raise ValueError(
                f"{valid.shape[1]} mask pairs an image are possible and max_pairs is {limit}: "
                "pass a key to draw from them, or raise max_pairs"
            )
        priority = priority * (1.0 + jax.random.uniform(key, valid.shape))
    priority, order = _largest(priority, size)
    kept = jnp.minimum(valid.sum(-1), size)
    scale = valid.sum(-1) / jnp.maximum(kept, 1)
    weight = jnp.where(priority > 0, scale[:, None], 0.0)
    query, target = (jnp.take_along_axis(x, order, axis=1) for x in (query, target))
    return Pairs(query, target, weight)


def pair_mask_losses(
    pred: Float[Array, "p q h w"],
    masks: Shaped[Array, "p n h2 w2"],
    pairs: Pairs,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    chunk: int = 8,
    points: PointSampling | None = None,
    key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sums of the focal and dice losses over all pairs.

    ``chunk`` pairs of each image are compared at a time, forwards and backwards, so temporaries
    are about chunk x h2 x w2 floats an image; chunks of nothing but padding cost no time.

    Args:
      pred: logits.
      masks: targets, boolean or 0..1.
      points: read both at points (then ``key`` is needed) instead of at the target's size.

    Raises:
      ValueError: on ``points`` without ``key``.
    """
    if points is not None and key is None:
        raise ValueError("mask losses on sampled points need a key")
    size = pairs.query.shape[1]
    if size == 0 or masks.size == 0:
        return jnp.float32(0), jnp.float32(0)
    chunk = min(chunk, size)
    steps = -(-size // chunk)

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, steps * chunk - size)] + [(0, 0)] * (x.ndim - 2))
        return rearrange(x, "p (s c) ... -> s p c ...", c=chunk)

    # Gathered once: in the loop, the gradient of ``pred`` would be a sum over all steps.
    source = split(jnp.take_along_axis(pred, pairs.query[:, :, None, None], axis=1))
    target, weight = split(pairs.target), split(pairs.weight)
    used = (weight > 0).any(axis=(1, 2))
    at = None
    if points is not None:
        # Kept for the backward pass (100 KB a pair), which would have to sort all candidates again.
        shape = (*source.shape[1:3], points.count, 2)

        def draw(x: tuple) -> Array:
            used, source, key = x
            choose = functools.partial(_draw_points, points=points)
            return lax.cond(used, choose, lambda *_: jnp.zeros(shape), source, key)

        keys = jax.random.split(key, steps)
        at = lax.map(draw, (used, lax.stop_gradient(source), keys))

    def compare(source: Array, target: Array, weight: Array, at: Array | None) -> Array:
        goal = jnp.take_along_axis(masks, target[:, :, None, None], axis=1)
        if at is None:
            logits, goal = _at_target_size(source, goal)
        else:
            logits, goal = sample_map(source, at), sample_map(goal, at)
        focal = mask_focal(logits, goal, alpha=alpha, gamma=gamma)
        return jnp.stack([(focal * weight).sum(), (mask_dice(logits, goal) * weight).sum()])

    def step(x: tuple) -> Array:
        used, *arrays = x
        return lax.cond(used, compare, lambda *_: jnp.zeros(2), *arrays)

    sums = lax.map(jax.checkpoint(step), (used, source, target, weight, at)).sum(0)
    return sums[0], sums[1]


def uncertain_points(
    logits: Float[Array, "*b h w"],
    candidates: Float[Array, "*b m 2"],
    others: Float[Array, "*b r 2"],
    count: int,
) -> Float[Array, "*b k 2"]:
    """The ``count`` candidates where the logit is closest to 0, and all ``others``.

    Points are (x, y) fractions of the map. The logits are interpolated first: between -1 and 1
    lies a most uncertain 0.
    """
    doubt = -jnp.abs(sample_map(logits, candidates))
    _, order = _largest(doubt, count)
    chosen = jnp.take_along_axis(candidates, order[..., None], axis=-2)
    return jnp.concatenate([chosen, others], axis=-2)


def sample_map(
    maps: Shaped[Array, "*b h w"], points: Float[Array, "*b n 2"]
) -> Float[Array, "*b n"]:
    """Bilinear sample of each map at its own (x, y) fractions, zero outside, float32.

    torch's ``grid_sample`` without aligned corners. Gathers: with 12544 points a mask, the matrix
    products of :func:`sam3_jax.ops.image.sample_points` would cost more than the rest of the loss.
    """
    height, width = maps.shape[-2:]
    flat = maps.reshape(*maps.shape[:-2], height * width)
    x, y = points[..., 0] * width - 0.5, points[..., 1] * height - 0.5
    left, top = jnp.floor(x), jnp.floor(y)
    total = jnp.zeros(x.shape, jnp.float32)
    for column in (left, left + 1):
        for row in (top, top + 1):
            share = (1 - jnp.abs(x - column)) * (1 - jnp.abs(y - row))
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            index = jnp.clip(row, 0, height - 1) * width + jnp.clip(column, 0, width - 1)
            value = jnp.take_along_axis(flat, index.astype(jnp.int32), axis=-1)
            total += jnp.where(inside, share, 0.0) * value.astype(jnp.float32)
    return total


def _largest(
    x: Shaped[Array, "*b n"], count: int
) -> tuple[Shaped[Array, "*b k"], Int[Array, "*b k"]]:
    """Largest values and their indices, lower indices first among equals.

    Not ``lax.top_k``: for that XLA gathers a sharded batch on every device.
    """
    order = jnp.argsort(x, axis=-1, stable=True, descending=True)[..., :count]
    return jnp.take_along_axis(x, order, axis=-1), order


def _at_target_size(
    source: Float[Array, "p c h w"], goal: Shaped[Array, "p c h2 w2"]
) -> tuple[Float[Array, "p c n"], Shaped[Array, "p c n"]]:
    size = goal.shape[-2:]
    maps = rearrange(source.astype(jnp.float32), "p c h w -> p h w c")
    logits = rearrange(resize_bilinear(maps, size), "p h w c -> p c (h w)")
    return logits, goal.reshape(*goal.shape[:2], -1)


def _draw_points(
    logits: Float[Array, "p c h w"], key: PRNGKeyArray, points: PointSampling
) -> Float[Array, "p c n 2"]:
    first, second = jax.random.split(key)
    doubtful = int(points.importance * points.count)
    shape = logits.shape[:2]
    drawn = jax.random.uniform(first, (*shape, int(points.oversample * points.count), 2))
    others = jax.random.uniform(second, (*shape, points.count - doubtful, 2))
    return uncertain_points(logits, drawn, others, doubtful)
