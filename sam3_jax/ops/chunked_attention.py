"""Attention in tiles of scores, in plain XLA: exact, differentiable, on every platform.

The online softmax of FlashAttention (arXiv 2205.14135): tiles of queries, and for each of them
tiles of keys whose results are rescaled as the maximum grows. Takes biases, masks and dropout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

Dim = int | Any  # a size: an integer, or a symbolic one where jax.export traces
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
    """How to cut one head's scores (queries x keys), and how many heads to take at once."""

    rows: int  # queries a tile, at most
    cols: int  # keys a tile, at most
    whole: int  # heads of up to this many scores are not cut
    scores: int  # scores in memory, over all heads and batch entries that are taken at once
    barrier: bool  # keep XLA from fusing the softmax into the matrix products


# CPU. A tile (9 MB) stays in the last-level cache, and is large enough for XLA's threads, which
# meet after every operation. 5184 = 3 x 1728 = 4 x 1296: the grid of 72 x 72 tokens needs no
# padding. Float32 on two Zen 3 cores (busy ones: ranges), times PyTorch's flash kernel: 5184 tokens
# 1.1 to 1.3, the same with heads of 32 1.3, windows of 576 1.1 to 1.25, 201 queries of 5184 keys
# with bias .9 to 1.4; with 64 queries of all heads and all keys at once 2 to 2.3. XLA's products
# alone take .8 of that kernel's time. One head must be a plain matrix: unit axes cost 1.4x.
CPU_TILES = Tiles(rows=1728, cols=1296, whole=1728 * 1296, scores=1728 * 1296, barrier=True)
# GPU and TPU, where no flash kernel applies: float32, dropout, bias. All keys at once, 256 MB of
# float32 scores; 576 divides 5184; whole: 201 decoder queries of 5184 keys.
DEVICE_TILES = Tiles(rows=576, cols=1 << 30, whole=1 << 20, scores=1 << 26, barrier=False)
NO_TILES = Tiles(rows=1 << 30, cols=1 << 30, whole=1 << 60, scores=1 << 60, barrier=False)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def largest_divisor(n: Dim, limit: int) -> int:
    """Largest divisor of n that is at most limit, at least 1.

    Of a symbolic n: of all its values, and at most 64, as each trial is a proof.
    """
    most = min(n, max(limit, 1)) if isinstance(n, int) else min(max(limit, 1), 64)
    return next(i for i in range(most, 0, -1) if n % i == 0)


def pad_to(x: Array | None, axis: int, size: int) -> Array | None:
    """x with zeros (False) appended on ``axis`` up to ``size``; broadcast axes stay."""
    if x is None or x.shape[axis] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def _cut(x: Operands, axes: Operands, count: Dim, squeeze: bool) -> Operands:
    """``count`` equal parts of every operand that has an axis, on a new leading axis.

    ``squeeze``: parts of one entry lose the axis.
    """

    def cut(leaf: Array | None, axis: int | None) -> Array | None:
        if leaf is None or axis is None:
            return None
        axis %= leaf.ndim
        size = leaf.shape[axis] // count
        if squeeze and size == 1:
            return jnp.moveaxis(leaf, axis, 0)
        shape = (*leaf.shape[:axis], count, size, *leaf.shape[axis + 1 :])
        return jnp.moveaxis(leaf.reshape(shape), axis, 0)

    return Operands(*map(cut, x, axes))


def _merge(parts: Operands, x: Operands) -> Operands:
    """``parts``, completed by the operands that were not cut."""
    return Operands(*[w if p is None else p for p, w in zip(parts, x, strict=True)])


def _each(
    f: Callable[[Operands], Array],
    count: Dim,
    x: Operands,
    axes: Operands,
    *,
    squeeze: bool = False,
) -> Array:
    """f over ``count`` parts of the operands, one after the other, joined on the axis of q."""
    squeeze = squeeze and x.q.shape[axes.q] == count
    if count == 1 and not squeeze:
        return f(x)
    parts = _cut(x, axes, count, squeeze)
    if count == 1:
        return jnp.expand_dims(f(_merge(jax.tree.map(lambda y: y[0], parts), x)), axes.q)
    out = lax.map(lambda part: f(_merge(part, x)), parts)
    axis = axes.q % x.q.ndim
    out = jnp.moveaxis(out, 0, axis)
    return out if squeeze else out.reshape(*out.shape[:axis], -1, *out.shape[axis + 2 :])


def chunked(x: Operands, *, causal: bool, rate: float, tiles: Tiles) -> Float[Array, "b n h d"]:
    """Attention in tiles of scores; ``x`` as :func:`sam3_jax.ops.attention.attention` gets it.

    Gradients compute every tile again instead of keeping it.
    """
    b, n, h, _ = x.q.shape
    m = x.k.shape[1]
    row_tiles, col_tiles = 1, 1
    if n * m > tiles.whole:
        row_tiles, col_tiles = ceil_div(n, tiles.rows), ceil_div(m, tiles.cols)
    rows, cols = ceil_div(n, row_tiles), ceil_div(m, col_tiles)
    heads = largest_divisor(h, tiles.scores // (rows * cols))
    batch = largest_divisor(b, tiles.scores // (rows * cols * h)) if heads == h else 1
    if not isinstance(b, int) and 64 * rows * cols * h <= tiles.scores:
        batch = b  # no number divides it: small entries all at once, large ones one by one
    body = functools.partial(
        _rows_block, causal=causal, rate=rate, col_tiles=col_tiles, barrier=tiles.barrier
    )

    def head_block(x: Operands) -> Array:  # q (batch, heads, n, d), axes of one entry left out
        return _each(body, row_tiles, x, Operands(-2, None, None, -2, rows=0))

    def batch_block(x: Operands) -> Array:  # q (batch, n, h, d), or (n, h, d)
        # Here and not outside of the loop, where it would be bound by memory.
        q, k, v = (jnp.swapaxes(y, -3, -2) for y in x[:3])
        if q.dtype == jnp.float32:  # saves a pass over the scores
            q *= q.shape[-1] ** -0.5
        bias_axis = None
        if x.bias is not None:
            x, bias_axis = (x, -3) if x.bias.shape[-3] == h else (_drop(x, -3, heads), None)
        x = x._replace(q=q, k=k, v=v)
        axes = Operands(-3, -3, -3, bias_axis, keys=-1)
        return jnp.swapaxes(_each(head_block, h // heads, x, axes, squeeze=True), -3, -2)

    x = _with_positions(x, row_tiles * rows, col_tiles * cols)
    bias_axis = None
    if x.bias is not None:
        x, bias_axis = (x, 0) if x.bias.shape[0] == b else (_drop(x, 0, batch), None)
    axes = Operands(0, 0, 0, bias_axis, 0, 0)
    return _each(batch_block, b // batch, x, axes, squeeze=True)[:, :n]


def _drop(x: Operands, axis: int, size: Dim) -> Operands:
    """x with the broadcast axis of its bias left out where the parts lose that axis (size 1)."""
    return x._replace(bias=x.bias.squeeze(axis)) if size == 1 else x


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
        axes = Operands(None, -2, -2, -1, -1, cols=0)
        (out, _, total), _ = lax.scan(
            lambda state, part: (tile(state, _merge(part, x)), None),
            first,
            _cut(x, axes, col_tiles, squeeze=False),
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
        between = range(x.key_mask.ndim - 1, s.ndim - 1)  # heads and queries
        s = jnp.where(jnp.expand_dims(x.key_mask, between), s, -jnp.inf)
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
