"""Attention in tiles of scores, in plain XLA: exact, differentiable, on every platform.

The online softmax of FlashAttention (arXiv 2205.14135): tiles of queries, and for each of them
tiles of keys whose results are rescaled as the maximum grows. Takes biases, masks and dropout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

LOWEST = -1e30  # first running maximum: finite, so that a row of -inf alone gives exp(-inf) = 0


class Operands(NamedTuple):
    """What attention reads. Unused fields are None; inside ``chunked`` heads precede tokens."""

    q: Float[Array, "*q"]
    k: Float[Array, "*k"]
    v: Float[Array, "*v"]
    bias: Float[Array, "*s"] | None = None
    key_mask: Bool[Array, "*m"] | None = None
    keys: Key[Array, "*h"] | None = None  # dropout: one key a batch entry and head
    rows: Int[Array, " n"] | None = None  # positions of the queries and keys of a tile
    cols: Int[Array, " m"] | None = None


class Tiles(NamedTuple):
    """Limits of a tile: queries, keys, and scores over all heads and batch entries at once."""

    rows: int
    cols: int
    scores: int
    barrier: bool  # keep XLA from fusing the softmax into the matrix products


# CPU. A tile (9 MB) stays in the last-level cache and is large enough for XLA's threads, which
# meet after every operation; 5184 = 3 x 1728 = 4 x 1296, so the grid of 72x72 tokens needs no
# padding. Measured in float32 on two cores against PyTorch's flash kernel: 5184 tokens 1.1x its
# time (all keys at once with 64 queries: 1.3x), windows of 576 in groups of four heads 1.15x (all
# heads at once: 2.5x). One head at a time must be a plain matrix: unit axes cost 1.5x. Without
# barriers XLA computes the exponential inside the product's inner loop: 1.05x to 1.1x.
CPU_TILES = Tiles(rows=1728, cols=1296, scores=1728 * 1296, barrier=True)
# GPU and TPU, where no flash kernel applies: float32, dropout, bias. All keys at once; 256 MB of
# float32 scores. 576 divides 5184.
DEVICE_TILES = Tiles(rows=576, cols=1 << 30, scores=1 << 26, barrier=False)
NO_TILES = Tiles(rows=1 << 30, cols=1 << 30, scores=1 << 60, barrier=False)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def largest_divisor(n: int, limit: int) -> int:
    """Largest divisor of n that is at most limit, at least 1."""
    return next(i for i in range(min(n, max(limit, 1)), 0, -1) if n % i == 0)


def pad_to(x: Array | None, axis: int, size: int) -> Array | None:
    """x with zeros (False) appended on ``axis`` up to ``size``; broadcast axes stay."""
    if x is None or x.shape[axis] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def _cut(x: Operands, axes: Operands, count: int) -> Operands:
    """``count`` equal parts of every operand that has an axis, on a new leading axis."""

    def cut(leaf: Array | None, axis: int | None) -> Array | None:
        if leaf is None or axis is None:
            return None
        shape = leaf.shape[:axis] + (count, leaf.shape[axis] // count) + leaf.shape[axis + 1 :]
        return jnp.moveaxis(leaf.reshape(shape), axis, 0)

    return Operands(*map(cut, x, axes))


def _merge(parts: Operands, x: Operands) -> Operands:
    """``parts``, completed by the operands that were not cut."""
    return Operands(*[w if p is None else p for p, w in zip(parts, x, strict=True)])


def _each(
    f: Callable[[Operands], Array], count: int, x: Operands, axes: Operands, out_axis: int
) -> Array:
    """f over ``count`` parts of the operands, one after the other, joined on ``out_axis``."""
    if count == 1:
        return f(x)
    out = lax.map(lambda parts: f(_merge(parts, x)), _cut(x, axes, count))
    out = jnp.moveaxis(out, 0, out_axis)
    return out.reshape(*out.shape[:out_axis], -1, *out.shape[out_axis + 2 :])


def chunked(x: Operands, *, causal: bool, rate: float, tiles: Tiles) -> Float[Array, "b n h d"]:
    """Attention in tiles of scores; ``x`` as :func:`sam3_jax.ops.attention.attention` gets it.

    Gradients compute every tile again instead of keeping it.
    """
    b, n, h, _ = x.q.shape
    m = x.k.shape[1]
    row_tiles, col_tiles = ceil_div(n, tiles.rows), ceil_div(m, tiles.cols)
    rows, cols = ceil_div(n, row_tiles), ceil_div(m, col_tiles)
    heads = largest_divisor(h, tiles.scores // (rows * cols))
    batch = largest_divisor(b, tiles.scores // (rows * cols * h)) if heads == h else 1
    x = _with_positions(x, row_tiles * rows, col_tiles * cols)

    def head_block(x: Operands) -> Array:
        flat = _squeeze(x, batch, heads)
        lead = flat.q.ndim - 2
        axes = Operands(lead, None, None, lead, None, None, 0)
        body = functools.partial(
            _rows_block, causal=causal, rate=rate, col_tiles=col_tiles, barrier=tiles.barrier
        )
        return _each(body, row_tiles, flat, axes, lead).reshape(x.q.shape)

    def batch_block(x: Operands) -> Array:
        # Here and not outside of the loop: a transpose of everything is bound by memory.
        q, k, v = (jnp.swapaxes(y, 1, 2) for y in x[:3])
        if q.dtype == jnp.float32:  # saves a pass over the scores
            q *= q.shape[-1] ** -0.5
        x = x._replace(q=q, k=k, v=v)
        shared = x.bias is not None and x.bias.shape[1] == 1
        axes = Operands(1, 1, 1, None if shared else 1, None, 1)
        return jnp.swapaxes(_each(head_block, h // heads, x, axes, 1), 1, 2)

    shared = x.bias is not None and x.bias.shape[0] == 1
    axes = Operands(0, 0, 0, None if shared else 0, 0, 0)
    return _each(batch_block, b // batch, x, axes, 0)[:, :n]


def _with_positions(x: Operands, n: int, m: int) -> Operands:
    """x padded to n queries and m keys (masked), with the positions of both."""
    if x.k.shape[1] < m and x.key_mask is None:
        x = x._replace(key_mask=jnp.ones(x.k.shape[:2], bool))
    return Operands(
        q=pad_to(x.q, 1, n),
        k=pad_to(x.k, 1, m),
        v=pad_to(x.v, 1, m),
        bias=pad_to(pad_to(x.bias, 2, n), 3, m),
        key_mask=pad_to(x.key_mask, 1, m),
        keys=x.keys,
        rows=jnp.arange(n),
        cols=jnp.arange(m),
    )


def _squeeze(x: Operands, batch: int, heads: int) -> Operands:
    """x without those of its two leading axes (batch, heads) that have one entry."""
    kept = [i for i, size in enumerate((batch, heads)) if size > 1]

    def lead(shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(shape[i] for i in kept)

    q, k, v = (y.reshape(*lead(y.shape), *y.shape[2:]) for y in x[:3])
    bias, mask, keys = x.bias, x.key_mask, x.keys
    if bias is not None:
        bias = bias.reshape(*lead(bias.shape), *bias.shape[2:])
    if mask is not None:
        mask = mask.reshape(*lead((batch, 1)), 1, -1)
    if keys is not None:
        keys = keys.reshape(lead(keys.shape))
    return x._replace(q=q, k=k, v=v, bias=bias, key_mask=mask, keys=keys)


def _rows_block(
    x: Operands, *, causal: bool, rate: float, col_tiles: int, barrier: bool
) -> Float[Array, "*h n d"]:
    """Attention of a block of queries to all keys, one tile of keys after the other."""
    tile = jax.checkpoint(functools.partial(_tile, causal=causal, rate=rate, barrier=barrier))
    shape = (*x.q.shape[:-1], 1)
    first = (
        jnp.zeros(x.q.shape, jnp.float32),
        jnp.full(shape, LOWEST, jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )
    if col_tiles == 1:
        out, _, total = tile(first, x)
    else:
        lead = x.k.ndim - 2
        axes = Operands(None, lead, lead, lead + 1, lead + 1, None, None, 0)
        moving = _cut(x, axes, col_tiles)
        (out, _, total), _ = lax.scan(
            lambda state, parts: (tile(state, _merge(parts, x)), None), first, moving
        )
    return (out / jnp.where(total == 0, 1, total)).astype(x.q.dtype)


def _tile(
    state: tuple[Array, Array, Array], x: Operands, *, causal: bool, rate: float, barrier: bool
) -> tuple[Array, Array, Array]:
    """One step of the online softmax: (sum of p v, running maximum, sum of p)."""
    out, top, total = state
    precision = lax.Precision.HIGHEST if x.q.dtype == jnp.float32 else None
    dot = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    fence = lax.optimization_barrier if barrier else lambda y: y

    s = fence(dot("...nd,...md->...nm", x.q, x.k))
    if x.q.dtype != jnp.float32:  # otherwise q is scaled
        s *= x.q.shape[-1] ** -0.5
    if x.bias is not None:
        s += x.bias
    if x.key_mask is not None:
        s = jnp.where(x.key_mask, s, -jnp.inf)
    if causal:
        s = jnp.where(x.rows[:, None] >= x.cols, s, -jnp.inf)
    # The maximum only scales numerator and denominator alike: no gradient.
    new_top = lax.stop_gradient(jnp.maximum(top, s.max(axis=-1, keepdims=True)))
    p = fence(jnp.exp(s - new_top))
    decay = jnp.exp(top - new_top)
    total = total * decay + p.sum(axis=-1, keepdims=True)
    if rate:
        p *= _keep(x, rate, p.shape[-2:])
    out = out * decay + dot("...nm,...md->...nd", p.astype(x.v.dtype), x.v)
    return out, new_top, total


def _keep(x: Operands, rate: float, shape: tuple[int, int]) -> Float[Array, "*h n m"]:
    """Dropout's factors of a tile: 0, or 1 / (1 - rate)."""

    def draw(key: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(key, x.rows[0]), x.cols[0])
        return jax.random.bernoulli(key, 1 - rate, shape) / (1 - rate)

    for _ in range(x.keys.ndim):
        draw = jax.vmap(draw)
    return draw(x.keys)
