"""ViT trunk with windowed and global attention (paper section 3).

Upstream: ``sam3/model/vitdet.py``.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sam3_jax.config import VisionConfig
from sam3_jax.models.layers import Attention, Conv, DropPath, LayerNorm, Mlp, gelu, shard_batch
from sam3_jax.ops import windows
from sam3_jax.ops.rope import Rope, axial_rope


class Block(nn.Module):
    """Pre-norm transformer block over a map, or over a batch of windows of maps.

    ``window`` > 0 cuts the map inside the block, padding it with zeros that are attended (as
    upstream); a caller that has cut it already passes 0 and the windows a sample in ``rows``.
    """

    config: VisionConfig
    drop_path: float
    window: int = 0
    rows: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w d"], rope: Rope, deterministic: bool = True
    ) -> Float[Array, "b h w d"]:
        cfg = self.config
        drop = DropPath(self.drop_path, self.rows)
        y = LayerNorm(cfg.layer_norm_eps, self.dtype, name="norm1")(x)
        if self.window:
            y = windows.partition(y, self.window)
        height, width = y.shape[1:3]
        y = rearrange(y, "b h w d -> b (h w) d")
        y = Attention(
            cfg.dim,
            cfg.num_heads,
            init="trunc_normal",
            out_init="trunc_normal",
            dtype=self.dtype,
            name="attn",
        )(y, y, y, rope=rope)
        y = rearrange(y, "b (h w) d -> b h w d", h=height, w=width)
        if self.window:
            y = windows.unpartition(y, *x.shape[1:3])
        x = x + drop(y, deterministic=deterministic)
        y = LayerNorm(cfg.layer_norm_eps, self.dtype, name="norm2")(x)
        y = Mlp(cfg.mlp_dim, cfg.dim, gelu, 0.0, "trunc_normal", self.dtype, name="mlp")(y)
        return x + drop(y, deterministic=deterministic)


class VisionTransformer(nn.Module):
    """Pixels to the stride-14 map. Any image size that the patches divide."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "b hp wp 3"], deterministic: bool = True
    ) -> Float[Array, "b h w d"]:
        """Args: ``pixels`` in [-1, 1]. Raises ValueError where patches do not divide the image."""
        cfg = self.config
        size = pixels.shape[1:3]
        if size[0] % cfg.patch_size or size[1] % cfg.patch_size:
            raise ValueError(f"image sides {size} must be multiples of {cfg.patch_size} pixels")
        x = Conv(
            cfg.dim,
            cfg.patch_size,
            cfg.patch_size,
            use_bias=False,
            dtype=self.dtype,
            name="patch_embed",
        )(pixels)
        x = x.astype(jnp.float32) + self._tiled_positions(*x.shape[1:3])
        x = LayerNorm(cfg.layer_norm_eps, name="norm_pre")(x)
        x = shard_batch(x)
        return self._blocks(x, deterministic).astype(self.dtype)

    def _tiled_positions(self, height: int, width: int) -> Float[Array, "h w d"]:
        side = self.config.pos_grid
        table = self.param(
            "pos_embed",
            lambda key: (
                0.02
                * jax.random.truncated_normal(key, -100.0, 100.0, (side, side, self.config.dim))
            ),
        )
        return jnp.tile(table, (-(-height // side), -(-width // side), 1))[:height, :width]

    def _blocks(self, x: Float[Array, "b h w d"], deterministic: bool) -> Float[Array, "b h w d"]:
        """Runs of window blocks stay cut in windows; only global blocks need the whole map."""
        cfg = self.config
        side, (height, width) = cfg.window_size, x.shape[1:3]
        exact = height % side == 0 and width % side == 0
        per_image = (height // side) * (width // side)
        head_dim = cfg.dim // cfg.num_heads
        local = axial_rope(side, side, head_dim, theta=cfg.rope_theta)
        whole = axial_rope(
            height,
            width,
            head_dim,
            theta=cfg.rope_theta,
            scale_y=side / height,
            scale_x=side / width,
        )
        block = nn.remat(Block, static_argnums=(3,)) if cfg.remat else Block
        cut = False
        for i in range(cfg.depth):
            windowed = i not in cfg.global_blocks
            if exact and windowed != cut:
                x = (
                    windows.partition(x, side)
                    if windowed
                    else windows.unpartition(x, height, width)
                )
                x = shard_batch(x)
                cut = windowed
            x = block(
                cfg,
                drop_path=cfg.drop_path * i / max(cfg.depth - 1, 1),
                window=side if windowed and not exact else 0,
                rows=per_image if cut else 1,
                dtype=self.dtype,
                name=f"block_{i}",
            )(x, local if windowed else whole, deterministic)
        return windows.unpartition(x, height, width) if cut else x
