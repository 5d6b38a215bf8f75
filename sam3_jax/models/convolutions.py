"""Layers of maps: convolutions and what goes with them, channels last."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sam3_jax.models.layers import LayerNorm, Mlp, gelu, init_bias, init_kernel, precision
from sam3_jax.ops.convolution import conv2d


class Conv(nn.Module):
    """2-D convolution, channels last, kernel HWIO. Zero padding of ``pad`` cells on every side."""

    features: int
    size: int
    stride: int = 1
    pad: int = 0
    groups: int = 1
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        size, channels = self.size, x.shape[-1]
        fan_in = size * size * channels // self.groups
        shape = (size, size, channels // self.groups, self.features)
        kernel = self.param("kernel", lambda key: init_kernel("torch", key, fan_in, 0, shape))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if size == self.stride and not self.pad and self.groups == 1:
            y = self._patches(x, kernel)
        else:
            y = conv2d(x, kernel, self.stride, self.pad, self.groups, precision(self.dtype))
        if self.use_bias:
            bias = self.param("bias", lambda key: init_bias("torch", key, fan_in, (self.features,)))
            y = y + bias.astype(y.dtype)
        return y.astype(self.dtype)

    def _patches(self, x: Array, kernel: Array) -> Array:
        """Patches that do not overlap are one matrix product."""
        b, h, w, c = x.shape
        s = self.size
        h, w = h // s, w // s
        x = x[:, : h * s, : w * s].reshape(b, h, s, w, s, c).swapaxes(2, 3)
        return jnp.dot(
            x.reshape(b, h, w, s * s * c),
            kernel.reshape(s * s * c, self.features),
            precision=precision(self.dtype),
            preferred_element_type=jnp.float32,
        )


class Upsample2x(nn.Module):
    """Transposed convolution of size 2 and stride 2, which is one matrix product.

    The kernel has the layout of ``nn.ConvTranspose(transpose_kernel=True)``: (2, 2, out, in).
    """

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        b, h, w, c = x.shape
        fan_in = 4 * self.features  # PyTorch counts a transposed convolution's fan from its output
        kernel = self.param(
            "kernel",
            lambda key: init_kernel("torch", key, fan_in, 0, (2, 2, self.features, c)),
        )
        bias = self.param("bias", lambda key: init_bias("torch", key, fan_in, (self.features,)))
        y = lax.dot_general(
            x.astype(self.dtype),
            kernel.reshape(4 * self.features, c).astype(self.dtype),
            (((3,), (1,)), ((), ())),
            precision=precision(self.dtype),
            preferred_element_type=jnp.float32,
        )
        y = y.reshape(b, h, w, 2, 2, self.features) + bias
        y = y.astype(self.dtype).swapaxes(2, 3)
        return y.reshape(b, 2 * h, 2 * w, self.features)


class GroupNorm(nn.Module):
    """GroupNorm over a map (eps 1e-5), computed in float32."""

    groups: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        dim = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (dim,)).reshape(self.groups, -1)
        bias = self.param("bias", nn.initializers.zeros, (dim,)).reshape(self.groups, -1)
        y = x.astype(jnp.float32).reshape(*x.shape[:-1], self.groups, -1)
        y = y - y.mean(axis=(1, 2, 4), keepdims=True)
        variance = jnp.square(y).mean(axis=(1, 2, 4), keepdims=True)
        y = y * lax.rsqrt(variance + 1e-5) * scale + bias
        return y.reshape(x.shape).astype(self.dtype)


class ConvNextBlock(nn.Module):
    """ConvNeXt block, depthwise 7x7 (upstream ``CXBlock`` in ``sam3/model/memory.py``)."""

    dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        y = Conv(self.dim, 7, pad=3, groups=self.dim, dtype=self.dtype, name="dwconv")(x)
        y = LayerNorm(eps=1e-6, dtype=self.dtype, name="norm")(y)
        y = Mlp(4 * self.dim, self.dim, gelu, dtype=self.dtype, name="mlp")(y)
        gamma = self.param("gamma", nn.initializers.constant(1e-6), (self.dim,))
        return x + gamma * y


class HalvingBlock(nn.Module):
    """A map of half the size: a convolution of stride 2, and a residual one, each normalised.

    Early convolutions let a ViT learn from far fewer pictures (arXiv:2106.14881).
    """

    dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        x = Conv(self.dim, 3, stride=2, pad=1, dtype=self.dtype, name="down")(x)
        x = nn.relu(LayerNorm(dtype=self.dtype, name="down_norm")(x))
        y = Conv(self.dim, 3, pad=1, dtype=self.dtype, name="conv")(x)
        return x + nn.relu(LayerNorm(dtype=self.dtype, name="conv_norm")(y))
