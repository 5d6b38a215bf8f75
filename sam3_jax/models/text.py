"""Causal text transformer (paper section 3; upstream ``sam3/model/text_encoder_ve.py``)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sam3_jax.config import TextConfig
from sam3_jax.models.layers import Attention, Embedding, LayerNorm, Linear, Mlp, gelu
from sam3_jax.models.scan import scan_blocks, stack_blocks
from sam3_jax.types import TextFeatures


class TextBlock(nn.Module):
    """Pre-norm causal block (upstream ``ResidualAttentionBlock``)."""

    config: TextConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "t n d"]) -> Float[Array, "t n d"]:
        cfg = self.config
        y = LayerNorm(cfg.layer_norm_eps, self.dtype, name="norm1")(x)
        attend = Attention(cfg.dim, cfg.num_heads, dtype=self.dtype, name="attn")
        x = x + attend(y, y, y, causal=True)
        y = LayerNorm(cfg.layer_norm_eps, self.dtype, name="norm2")(x)
        return x + Mlp(cfg.mlp_dim, cfg.dim, gelu, dtype=self.dtype, name="mlp")(y)


class TextEncoder(nn.Module):
    """Token ids to prompt tokens of width ``dim``. Id 0 is padding."""

    config: TextConfig
    dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, token_ids: Int[Array, "t n"]) -> TextFeatures:
        """Raises ValueError where the ids are longer than the position table."""
        cfg = self.config
        length = token_ids.shape[1]
        if length > cfg.context_length:
            raise ValueError(f"{length} tokens; the text encoder takes {cfg.context_length}")
        table = Embedding(cfg.vocab_size, cfg.dim, name="token_embed")()
        position = Embedding(
            cfg.context_length, cfg.dim, nn.initializers.normal(0.01), name="pos_embed"
        )()
        x = table[token_ids].astype(jnp.float32) + position[:length]
        if cfg.scan and not self.is_initializing():
            x = self._scan(x)
        else:
            block = nn.remat(TextBlock) if cfg.remat else TextBlock
            for i in range(cfg.depth):
                x = block(cfg, self.dtype, name=f"block_{i}")(x)
        x = LayerNorm(cfg.layer_norm_eps, self.dtype, name="norm_final")(x)
        tokens = Linear(self.dim, dtype=self.dtype, name="resizer")(x)
        return TextFeatures(tokens, token_ids != 0)

    def _scan(self, x: Float[Array, "t n d"]) -> Float[Array, "t n d"]:
        """All blocks as one loop."""
        module = TextBlock(self.config, self.dtype, parent=None)
        blocks = [self.variables["params"][f"block_{i}"] for i in range(self.config.depth)]
        return scan_blocks(
            lambda x, params: module.apply({"params": params}, x),
            x,
            stack_blocks(blocks),
            remat=self.config.remat,
        )
