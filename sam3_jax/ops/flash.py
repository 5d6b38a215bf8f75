"""Flash attention kernels that others wrote, fitted to :mod:`sam3_jax.ops.attention`.

``cudnn``: NVIDIA's, through ``jax.nn.dot_product_attention``. ``splash``: jax's Pallas kernel for
TPUs (``jax.experimental.pallas.ops.tpu.splash_attention``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Bool, Float

from sam3_jax.ops.chunked_attention import Operands, ceil_div, largest_divisor, pad_to

# Splash: queries or keys a block, at most. 5184 is padded to 5376 = 6 x 896, windows of 576 to 640.
# Larger than jax's default of 128, for fewer passes over the keys. Not yet timed on a TPU.
SPLASH_BLOCK = 1024
SPLASH_LANES = 128


@functools.cache
def cudnn_head_limit() -> int:
    """Largest head size of cuDNN's kernels and their gradients: 256 on Hopper, elsewhere 128.

    On newer GPUs, too, jax allows 256, which has not been tried here. Of this process's first GPU;
    without one (compiling ahead of time) 128, as jax then decides.
    """
    if jax.default_backend() != "gpu":
        return 128
    return 256 if jax.local_devices()[0].compute_capability == "9.0" else 128


def cudnn(x: Operands, *, causal: bool) -> Float[Array, "b n h d"]:
    """cuDNN's flash attention (16 bits, no dropout, head size a multiple of 8 up to a limit).

    A key mask becomes a length, for which the valid keys are moved to the front; with a bias it is
    added to that. A bias has odd lengths padded, without which cuDNN has no gradient.
    """
    q, k, v, bias, mask = x[:5]
    n, m = q.shape[1], k.shape[1]
    lengths = None
    if bias is not None:
        q, k, v = (pad_to(y, 1, y.shape[1] + y.shape[1] % 2) for y in (q, k, v))
        low = max(-1e9, float(jnp.finfo(q.dtype).min) / 2)
        if m % 2 and mask is None:
            mask = jnp.ones(k.shape[:1] + (m,), bool)
        bias = pad_to(pad_to(bias, 2, q.shape[1]), 3, k.shape[1])
        if mask is not None:
            bias = jnp.where(pad_to(mask, 1, k.shape[1])[:, None, None], bias, low)
        bias = bias.astype(q.dtype)
    elif mask is not None:
        order = jnp.argsort(~mask, axis=1, stable=True)[:, :, None, None]
        k, v = (jnp.take_along_axis(y, order, axis=1) for y in (k, v))
        lengths = jnp.maximum(mask.sum(axis=1, dtype=jnp.int32), 1)
    out = jax.nn.dot_product_attention(
        q, k, v, bias, is_causal=causal, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return _without_empty(out[:, :n], x.key_mask)


def splash(x: Operands, *, causal: bool, interpret: bool) -> Float[Array, "b n h d"]:
    """Pallas splash attention (no bias, no dropout); ``interpret`` runs it without a TPU.

    Lengths are padded to multiples of 128; segment ids hide invalid keys.
    """
    (b, n, h, d), m = x.q.shape, x.k.shape[1]
    n_pad, m_pad = (ceil_div(size, SPLASH_LANES) * SPLASH_LANES for size in (n, m))
    q = (x.q.astype(jnp.float32) * d**-0.5).astype(x.q.dtype)
    q, k, v = (
        jnp.swapaxes(pad_to(y, 1, size), 1, 2)
        for y, size in ((q, n_pad), (x.k, m_pad), (x.v, m_pad))
    )
    segments = None
    if m_pad > m or x.key_mask is not None:
        valid = jnp.ones((b, m), bool) if x.key_mask is None else x.key_mask
        valid = pad_to(valid, 1, m_pad).astype(jnp.int32)
        segments = splash_kernel.SegmentIds(q=jnp.ones((b, n_pad), jnp.int32), kv=valid)
    rows, cols = (
        SPLASH_LANES * largest_divisor(size // SPLASH_LANES, SPLASH_BLOCK // SPLASH_LANES)
        for size in (n_pad, m_pad)
    )
    # Small heads as the minor axis would be padded to 128 lanes: three times the memory.
    layout = splash_kernel.QKVLayout["SEQ_MINOR" if d % SPLASH_LANES else "HEAD_DIM_MINOR"]
    mask = (splash_mask.CausalMask if causal else splash_mask.FullMask)((n_pad, m_pad))

    def run(q: Array, k: Array, v: Array, segments: Any) -> Array:
        kernel = splash_kernel.make_splash_mha_single_device(
            splash_mask.MultiHeadMask([mask] * h),
            block_sizes=splash_kernel.BlockSizes(
                block_q=rows,
                block_kv=cols,
                block_q_dkv=rows,
                block_kv_dkv=cols,
                block_q_dq=rows,
                block_kv_dq=cols,
                q_layout=layout,
                k_layout=layout,
                v_layout=layout,
            ),
            interpret=interpret,
        )
        return jax.vmap(kernel)(q, k, v, segments)

    # Mosaic refuses to multiply bfloat16 at any precision but the default.
    precision = "highest" if q.dtype == jnp.float32 else "default"
    out = _at_precision(run, precision)(q, k, v, segments)
    return _without_empty(jnp.swapaxes(out, 1, 2)[:, :n], x.key_mask)


def _at_precision(f: Callable[..., Array], precision: str) -> Callable[..., Array]:
    """f(q, k, v, segments), it and its gradient traced at a matmul precision of their own."""

    @jax.custom_vjp
    def g(q: Array, k: Array, v: Array, segments: Any) -> Array:
        with jax.default_matmul_precision(precision):
            return f(q, k, v, segments)

    def forward(q: Array, k: Array, v: Array, segments: Any) -> tuple[Array, Callable]:
        with jax.default_matmul_precision(precision):
            return jax.vjp(lambda q, k, v: f(q, k, v, segments), q, k, v)

    def backward(pull: Callable, grad: Array) -> tuple[Array | None, ...]:
        with jax.default_matmul_precision(precision):
            return (*pull(grad), None)

    g.defvjp(forward, backward)
    return g


def _without_empty(
    out: Float[Array, "b n h d"], key_mask: Bool[Array, "b m"] | None
) -> Float[Array, "b n h d"]:
    """Zeros for batch entries without a valid key."""
    if key_mask is None:
        return out
    return jnp.where(key_mask.any(axis=1)[:, None, None, None], out, 0)
