"""The layer that geometry and fusion encoder are stacks of."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sam3_jax.models.layers import Attention, LayerNorm, Mlp


class CrossAttentionLayer(nn.Module):
    """Pre-norm layer: self-attention, cross-attention to a memory, feed-forward.

    Upstream: ``TransformerEncoderLayer`` (``sam3/model/encoder.py``); fusion and geometry encoder
    are stacks of it. The residual stream stays float32, as under upstream's autocast.
    """

    dim: int
    num_heads: int
    mlp_dim: int
    dropout: float
    xavier: bool  # fusion is initialised by TransformerWrapper, the geometry encoder is not
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        memory: Float[Array, "b m d"],
        pos: Float[Array, "#b n d"] | None = None,
        memory_pos: Float[Array, "#b m d"] | None = None,
        mask: Bool[Array, "b n"] | None = None,
        memory_mask: Bool[Array, "b m"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "b n d"]:
        """``pos``: added to queries and keys of self-attention; ``memory_pos``: to the keys of
        cross-attention.
        """

        def norm(name: str) -> LayerNorm:
            return LayerNorm(dtype=self.dtype, name=name)

        def attend(name: str) -> Attention:
            return Attention(
                self.dim,
                self.num_heads,
                dropout=self.dropout,
                out_init="xavier_zero_bias" if self.xavier else "torch_zero_bias",
                dtype=self.dtype,
                name=name,
            )

        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        y = norm("norm1")(x)
        q = y if pos is None else y + pos.astype(y.dtype)
        y = attend("self_attn")(q, q, y, key_mask=mask, deterministic=deterministic)
        x = x + drop(y)
        keys = memory if memory_pos is None else memory + memory_pos.astype(memory.dtype)
        y = attend("cross_attn")(
            norm("norm2")(x), keys, memory, key_mask=memory_mask, deterministic=deterministic
        )
        x = x + drop(y)
        init = "xavier" if self.xavier else "torch"
        ffn = Mlp(self.mlp_dim, self.dim, nn.relu, self.dropout, init, self.dtype, name="ffn")
        return x + drop(ffn(norm("norm3")(x), deterministic=deterministic))
