"""Layers that every stage shares: one ``Linear``, one ``Attention``, norm, MLPs.

Parameters are float32 and named ``kernel``/``bias``/``scale``. ``dtype`` is the compute dtype:
matrix products take inputs of that dtype and accumulate in float32; norms and softmax compute in
float32. Float32 means float32 on every platform (``Precision.HIGHEST``), never TF32 or bf16 passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sam3_jax.ops.attention import BATCH_AXES, attention
from sam3_jax.ops.rope import Rope, apply_rope, pairs_apart

Init = str  # a key of KERNEL_BOUND, "normal" is not among them: embeddings use nn.initializers

KERNEL_BOUND: dict[Init, Callable[[int, int], float]] = {
    # PyTorch's default of nn.Linear and nn.Conv2d, for kernel and bias
    "torch": lambda fan_in, fan_out: 1.0 / math.sqrt(fan_in),
    # nn.MultiheadAttention's output projection: default kernel, zero bias
    "torch_zero_bias": lambda fan_in, fan_out: 1.0 / math.sqrt(fan_in),
    # TransformerWrapper._reset_parameters: kernels only, biases keep their default
    "xavier": lambda fan_in, fan_out: math.sqrt(6.0 / (fan_in + fan_out)),
    "xavier_zero_bias": lambda fan_in, fan_out: math.sqrt(6.0 / (fan_in + fan_out)),
    # nn.MultiheadAttention draws q, k and v as one (3 * dim, dim) matrix
    "xavier_qkv": lambda fan_in, fan_out: math.sqrt(6.0 / (fan_in + 3 * fan_out)),
}


def precision(dtype: DTypeLike) -> lax.Precision | None:
    """Full float32 products where float32 was asked for, the platform's own otherwise."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def shard_batch(x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Pins the leading axis to the batch axes of the mesh in use (``jax.set_mesh``), if any.

    Keeps XLA from resharding where windows are cut out of maps and put back.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)
    if not axes or x.shape[0] % math.prod(mesh.shape[axis] for axis in axes):
        return x
    return lax.with_sharding_constraint(x, PartitionSpec(axes))


def init_kernel(init: Init, key: Array, fan_in: int, fan_out: int, shape: tuple[int, ...]) -> Array:
    """A kernel as PyTorch's module of that kind draws it."""
    if init == "trunc_normal":
        return 0.02 * jax.random.truncated_normal(key, -100.0, 100.0, shape)
    if init == "zeros":
        return jnp.zeros(shape)
    bound = KERNEL_BOUND[init](fan_in, fan_out)
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def init_bias(init: Init, key: Array, fan_in: int, shape: tuple[int, ...]) -> Array:
    """The bias beside it: of the same bound, or zero."""
    if init in ("torch", "xavier"):
        bound = 1.0 / math.sqrt(fan_in)
        return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
    return jnp.zeros(shape)


class Linear(nn.Module):
    """Affine map of the last ``in_axes`` axes to ``features`` (one size, or several).

    ``order``: of the last axis of what comes out; parameters keep their own.
    """

    features: int | tuple[int, ...]
    in_axes: int = 1
    init: Init = "torch"
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    order: tuple[int, ...] | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        features = (self.features,) if isinstance(self.features, int) else self.features
        shape = x.shape[x.ndim - self.in_axes :]
        fan_in, fan_out = math.prod(shape), math.prod(features)
        kernel = self.param(
            "kernel", lambda key: init_kernel(self.init, key, fan_in, fan_out, shape + features)
        )
        if self.order is not None:
            kernel = kernel[..., np.asarray(self.order)]
        # One flat matrix product: backends know it better than one over several axes.
        y = lax.dot_general(
            x.reshape(*x.shape[: x.ndim - self.in_axes], fan_in).astype(self.dtype),
            kernel.reshape(fan_in, fan_out).astype(self.dtype),
            (((x.ndim - self.in_axes,), (0,)), ((), ())),
            precision=precision(self.dtype),
            preferred_element_type=jnp.float32,
        )
        y = y.reshape(*y.shape[:-1], *features)
        if self.use_bias:
            bias = self.param("bias", lambda key: init_bias(self.init, key, fan_in, features))
            y = y + (bias if self.order is None else bias[..., np.asarray(self.order)])
        return y.astype(self.dtype)


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, computed in float32."""

    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        # Pinned, forwards and backwards: in training XLA would pass activations between chips to
        # suit split parameters, where it can fetch the parameters.
        x = shard_batch(x.astype(jnp.float32))
        x = x - x.mean(axis=-1, keepdims=True)
        variance = jnp.square(x).mean(axis=-1, keepdims=True)
        return (x * lax.rsqrt(variance + self.eps) * scale + bias).astype(self.dtype)


class Embedding(nn.Module):
    """A learned (``rows``, ``dim``) table, N(0, 1) at the start; calling it returns the table."""

    rows: int
    dim: int
    init: Callable = nn.initializers.normal(1.0)

    @nn.compact
    def __call__(self) -> Float[Array, "n d"]:
        return self.param("embedding", self.init, (self.rows, self.dim))


class Attention(nn.Module):
    """Multi-head attention with separate projections, so that heads are an axis of their own.

    Covers PyTorch's ``nn.MultiheadAttention``, the ViT's fused qkv and SAM's down-projected
    attention (``inner_dim``). ``init``/``out_init``: kernel initialisers of q, k, v and of out.
    """

    dim: int
    num_heads: int
    inner_dim: int | None = None
    dropout: float = 0.0
    init: Init = "xavier_qkv"
    out_init: Init = "torch_zero_bias"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        query: Float[Array, "b n dq"],
        key: Float[Array, "b m dk"],
        value: Float[Array, "b m dv"],
        *,
        bias: Float[Array, "#b #h n m"] | None = None,
        key_mask: Bool[Array, "b m"] | None = None,
        causal: bool = False,
        rope: Rope | None = None,
        key_rope: Rope | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "b n d"]:
        """``rope`` rotates the queries, ``key_rope`` (default: the same) the keys."""
        heads = (self.num_heads, (self.inner_dim or self.dim) // self.num_heads)
        order = None if rope is None else tuple(pairs_apart(heads[1]).tolist())
        q = Linear(heads, init=self.init, dtype=self.dtype, order=order, name="q")(query)
        k = Linear(heads, init=self.init, dtype=self.dtype, order=order, name="k")(key)
        v = Linear(heads, init=self.init, dtype=self.dtype, name="v")(value)
        if rope is not None:
            q = apply_rope(q, rope)
            k = apply_rope(k, rope if key_rope is None else key_rope)
        rate = 0.0 if deterministic else self.dropout
        out = attention(
            q,
            k,
            v,
            bias=bias,
            key_mask=key_mask,
            causal=causal,
            dropout_rate=rate,
            dropout_rng=self.make_rng("dropout") if rate else None,
        )
        return Linear(self.dim, in_axes=2, init=self.out_init, dtype=self.dtype, name="out")(out)


class Mlp(nn.Module):
    """Two linear layers with an activation and dropout between them."""

    hidden: int
    dim: int
    activation: Callable[[Array], Array] = nn.relu
    dropout: float = 0.0
    init: Init = "torch"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*n d"], *, deterministic: bool = True
    ) -> Float[Array, "*n d"]:
        x = Linear(self.hidden, init=self.init, dtype=self.dtype, name="fc1")(x)
        x = self.activation(x)
        x = nn.Dropout(self.dropout)(x, deterministic=deterministic)
        return Linear(self.dim, init=self.init, dtype=self.dtype, name="fc2")(x)


class Head(nn.Module):
    """``depth`` linear layers with ReLU between: DETR's prediction heads (upstream ``MLP``)."""

    hidden: int
    dim: int
    depth: int
    init: Init = "torch"
    last_init: Init | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d2"]:
        for i in range(self.depth - 1):
            x = nn.relu(Linear(self.hidden, init=self.init, dtype=self.dtype, name=f"layer_{i}")(x))
        init = self.last_init or self.init
        return Linear(self.dim, init=init, dtype=self.dtype, name=f"layer_{self.depth - 1}")(x)


def gelu(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Exact GELU, PyTorch's default, in float32.

    Flax's own goes through ``erfc``, which takes 2.7 times as long on a CPU.
    """
    y = x.astype(jnp.float32)
    return (0.5 * y * (1.0 + lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch for whole samples (needs the "dropout" rng).

    ``rows`` successive entries of the leading axis belong to one sample (attention windows). The
    rate may be an array, as where blocks of several rates are one loop.
    """

    rate: float | Float[Array, ""]
    rows: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "b ..."], *, deterministic: bool = True
    ) -> Float[Array, "b ..."]:
        if deterministic or (isinstance(self.rate, float) and self.rate == 0.0):
            return x
        samples = x.shape[0] // self.rows
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.rate, (samples,))
        keep = jnp.repeat(keep, self.rows).reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(keep, x / (1.0 - self.rate), 0.0).astype(x.dtype)
