"""Memory of the tracker: mask encoder and memory attention.

Upstream: ``sam3/model/memory.py``, ``TransformerEncoderCrossAttention`` in
``sam3/model/decoder.py``, ``RoPEAttention`` in ``sam3/sam/transformer.py``.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sam3_jax.config import MemoryConfig
from sam3_jax.models.convolutions import Conv, ConvNextBlock
from sam3_jax.models.layers import Attention, LayerNorm, Mlp, gelu
from sam3_jax.ops.image import resize_bilinear
from sam3_jax.ops.rope import Rope


class MaskDownsampler(nn.Module):
    """Masks at 16 times the grid (other sizes are resized) to grid cells: four stride-2 convs."""

    dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, masks: Float[Array, "b h w 1"], grid: tuple[int, int]
    ) -> Float[Array, "b gh gw d"]:
        x = resize_bilinear(masks, (16 * grid[0], 16 * grid[1]), antialias=True)
        for i in range(4):
            x = Conv(4 ** (i + 1), 3, stride=2, pad=1, dtype=self.dtype, name=f"conv_{i}")(x)
            x = gelu(LayerNorm(eps=1e-6, dtype=self.dtype, name=f"norm_{i}")(x))
        return Conv(self.dim, 1, dtype=self.dtype, name="out")(x)


class FusedMaskEncoder(nn.Module):
    """Image map plus mask, mixed by ConvNeXt blocks (upstream ``SimpleMaskEncoder``)."""

    dim: int
    out_dim: int
    depth: int = 2
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array, "b h w d"], masks: Float[Array, "b mh mw 1"]
    ) -> Float[Array, "b h w o"]:
        """``masks``: values as the network was trained on them (memory: sigmoid x 20 - 10)."""
        x = Conv(self.dim, 1, dtype=self.dtype, name="pixel_proj")(features)
        x = x + MaskDownsampler(self.dim, self.dtype, name="mask_downsampler")(
            masks, features.shape[1:3]
        )
        for i in range(self.depth):
            x = ConvNextBlock(self.dim, self.dtype, name=f"block_{i}")(x)
        if self.out_dim == self.dim:
            return x
        return Conv(self.out_dim, 1, dtype=self.dtype, name="out_proj")(x)


class MemoryAttentionLayer(nn.Module):
    """Pre-norm self-attention on the map and cross-attention to memory, both rotary."""

    config: MemoryConfig
    dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        memory: Float[Array, "b m c"],
        memory_pos: Float[Array, "b m c"],
        memory_mask: Bool[Array, "b m"],
        rope: Rope,
        memory_rope: Rope,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "b n d"]:
        cfg = self.config

        def attend(name: str) -> Attention:
            return Attention(
                self.dim,
                cfg.attention_heads,
                dropout=cfg.dropout,
                init="xavier",
                out_init="xavier",
                dtype=self.dtype,
                name=name,
            )

        drop = nn.Dropout(cfg.dropout, deterministic=deterministic)
        y = LayerNorm(dtype=self.dtype, name="norm1")(x)
        y = attend("self_attn")(y, y, y, rope=rope, deterministic=deterministic)
        x = x + drop(y)
        y = attend("cross_attn")(
            LayerNorm(dtype=self.dtype, name="norm2")(x),
            memory + memory_pos,
            memory,
            key_mask=memory_mask,
            rope=rope,
            key_rope=memory_rope,
            deterministic=deterministic,
        )
        x = x + drop(y)
        y = LayerNorm(dtype=self.dtype, name="norm3")(x)
        ffn = Mlp(cfg.mlp_dim, self.dim, nn.relu, cfg.dropout, "xavier", self.dtype, name="ffn")
        return x + drop(ffn(y, deterministic=deterministic))


class MemoryAttention(nn.Module):
    """Conditions a frame's map on the memory tokens of an object."""

    config: MemoryConfig
    dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        features: Float[Array, "b n d"],
        pos: Float[Array, "#b n d"],
        memory: Float[Array, "b m c"],
        memory_pos: Float[Array, "b m c"],
        memory_mask: Bool[Array, "b m"],
        rope: Rope,
        memory_rope: Rope,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "b n d"]:
        """``memory_rope`` covers all m keys; tokens that are not rotated have cos 1 and sin 0."""
        x = features.astype(jnp.float32) + 0.1 * pos
        for i in range(self.config.attention_depth):
            x = MemoryAttentionLayer(self.config, self.dim, self.dtype, name=f"layer_{i}")(
                x, memory, memory_pos, memory_mask, rope, memory_rope, deterministic=deterministic
            )
        return LayerNorm(dtype=self.dtype, name="norm")(x)
