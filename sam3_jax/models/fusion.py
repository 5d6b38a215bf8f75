"""Fusion encoder: image tokens read the prompt (paper section 3).

Upstream: ``sam3/model/encoder.py``.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sam3_jax.config import FusionConfig
from sam3_jax.models.cross_attention import CrossAttentionLayer
from sam3_jax.models.scan import scan_blocks, stack_blocks
from sam3_jax.ops.position import sine_grid
from sam3_jax.types import Levels


class FusionEncoder(nn.Module):
    """Six pre-norm layers over the flattened levels, without a final norm."""

    config: FusionConfig
    dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        levels: Levels,
        prompt: Float[Array, "p m d"],
        prompt_mask: Bool[Array, "p m"],
        *,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "p n d"], Float[Array, "#p n d"]]:
        """Args: ``levels`` to fuse, one map a prompt. Returns the memory and its positions.

        Levels are flattened in the order given. Released: the stride-14 level alone; more of them
        get a learned embedding each, added to the position.
        """
        cfg = self.config
        x = jnp.concatenate([rearrange(v, "p h w d -> p (h w) d") for v in levels], axis=1)
        positions = [sine_grid(*v.shape[1:3], self.dim).reshape(-1, self.dim) for v in levels]
        pos = jnp.asarray(np.concatenate(positions))
        if cfg.num_levels > 1:
            embed = self.param(
                "level_embed", nn.initializers.xavier_uniform(), (cfg.num_levels, self.dim)
            )
            pos = pos + jnp.repeat(
                embed,
                np.array([len(p) for p in positions]),
                axis=0,
                total_repeat_length=pos.shape[0],
            )
        pos = pos[None]
        x = x.astype(jnp.float32)
        if cfg.scan and not self.is_initializing():
            return self._scan(x, prompt, pos, prompt_mask, deterministic), pos
        for i in range(cfg.depth):
            x = self._layer(remat=cfg.remat, name=f"layer_{i}")(
                x, prompt, pos, None, None, prompt_mask, deterministic
            )
        return x, pos

    def _scan(
        self,
        x: Float[Array, "p n d"],
        prompt: Float[Array, "p m d"],
        pos: Float[Array, "#p n d"],
        prompt_mask: Bool[Array, "p m"],
        deterministic: bool,
    ) -> Float[Array, "p n d"]:
        """All layers as one loop. Dropout draws other numbers than without."""
        cfg = self.config
        module = self._layer(remat=False, parent=None)
        layers = stack_blocks([self.variables["params"][f"layer_{i}"] for i in range(cfg.depth)])
        keys = None
        if cfg.dropout and not deterministic:
            keys = jax.random.split(self.make_rng("dropout"), cfg.depth)

        def layer(x: Array, entry: tuple) -> Array:
            params, key = entry
            rngs = None if key is None else {"dropout": key}
            args = (x, prompt, pos, None, None, prompt_mask, deterministic)
            return module.apply({"params": params}, *args, rngs=rngs)

        return scan_blocks(layer, x, (layers, keys), remat=cfg.remat)

    def _layer(self, *, remat: bool, **module: Any) -> CrossAttentionLayer:
        cfg = self.config
        layer = CrossAttentionLayer
        if remat:
            layer = nn.remat(layer, static_argnums=(7,))  # deterministic
        sizes = (self.dim, cfg.num_heads, cfg.mlp_dim, cfg.dropout)
        return layer(*sizes, xavier=True, dtype=self.dtype, **module)
