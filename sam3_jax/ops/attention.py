"""Scaled dot-product attention: one function for every platform."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

QUERY_CHUNK = 64


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    *,
    bias: Float[Array, "#b #h n m"] | None = None,
    key_mask: Bool[Array, "b m"] | None = None,
    causal: bool = False,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    implementation: str = "auto",
) -> Float[Array, "b n h d"]:
    """softmax(q k / sqrt(d) + bias) v; rows without a valid key give zeros."""
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    n, m, d = q.shape[1], k.shape[1], q.shape[-1]

    def rows(start, q_rows, bias_rows, rng):
        s = jnp.einsum(
            "bnhd,bmhd->bhnm", q_rows, k, precision=precision, preferred_element_type=jnp.float32
        )
        s = s * d**-0.5
        if bias_rows is not None:
            s = s + bias_rows
        mask = None if key_mask is None else key_mask[:, None, None]
        if causal:
            c = (start + jnp.arange(q_rows.shape[1]))[:, None] >= jnp.arange(m)
            mask = c if mask is None else mask & c
        if mask is not None:
            s = jnp.where(mask, s, -1e30)
        p = jax.nn.softmax(s)
        if mask is not None:
            p = jnp.where(mask, p, 0)
        if rng is not None:
            p = jnp.where(jax.random.bernoulli(rng, 1 - dropout_rate, p.shape), p, 0)
            p = p / (1 - dropout_rate)
        return jnp.einsum(
            "bhnm,bmhd->bnhd",
            p.astype(v.dtype),
            v,
            precision=precision,
            preferred_element_type=jnp.float32,
        ).astype(q.dtype)

    rng = dropout_rng if dropout_rate else None
    if n * m <= 1 << 20:
        return rows(0, q, bias, rng)
    out = []
    chunk = max(1, n // 8)
    for start in range(0, n, chunk):
        b = None if bias is None else bias[:, :, start : start + chunk]
        r = None if rng is None else jax.random.fold_in(rng, start)
        out.append(jax.checkpoint(rows)(start, q[:, start : start + chunk], b, r))
    return jnp.concatenate(out, axis=1)
