"""ViT trunk with windowed and global attention (paper section 3).

Upstream: ``sam3/model/vitdet.py``.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from sam3_jax.config import VisionConfig
from sam3_jax.models.convolutions import Conv, HalvingBlock
from sam3_jax.models.layers import Attention, DropPath, LayerNorm, Mlp, gelu, shard_batch
from sam3_jax.models.scan import scan_blocks, stack_blocks
from sam3_jax.ops import windows
from sam3_jax.ops.rope import Rope, axial_rope


class Block(nn.Module):
    """Pre-norm transformer block over a map, or over a batch of windows of maps.

    ``window`` > 0 cuts the map inside the block, padding it with zeros that are attended (as
    upstream); a caller that has cut it already passes 0 and the windows a sample in ``rows``.
    """

    config: VisionConfig
    drop_path: float | Float[Array, ""]
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
        x = pixels
        for i, width in enumerate(cfg.stem):
            x = HalvingBlock(width, self.dtype, name=f"stem_{i}")(x)
        patch, rest = divmod(cfg.patch_size, 2 ** len(cfg.stem))
        if rest:
            raise ValueError(f"patch_size {cfg.patch_size} cannot be halved {len(cfg.stem)} times")
        x = Conv(cfg.dim, patch, patch, use_bias=False, dtype=self.dtype, name="patch_embed")(x)
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
        grid = Grid(*x.shape[1:3], cfg.window_size)
        if cfg.scan and not self.is_initializing():
            return self._scan(x, grid, deterministic)
        block = nn.remat(Block, static_argnums=(3,)) if cfg.remat else Block
        for i, windowed in enumerate(_windowed(cfg)):
            x = grid.arrange(x, windowed=windowed)
            x = block(
                cfg,
                drop_path=cfg.drop_path * i / max(cfg.depth - 1, 1),
                window=cfg.window_size if windowed and not grid.exact else 0,
                rows=grid.windows if windowed and grid.exact else 1,
                dtype=self.dtype,
                name=f"block_{i}",
            )(x, self._rope(grid, windowed=windowed), deterministic)
        return grid.arrange(x, windowed=False)

    def _scan(
        self, x: Float[Array, "b h w d"], grid: Grid, deterministic: bool
    ) -> Float[Array, "b h w d"]:
        """The blocks as a loop over groups (released: 4) with a loop over each run of equal blocks.

        Every block draws its drop path with a key of its own, other ones than without ``scan``.
        """
        cfg = self.config
        rates, keys = [None] * cfg.depth, [None] * cfg.depth
        if cfg.drop_path and not deterministic:
            rates = jnp.linspace(0.0, cfg.drop_path, cfg.depth)
            keys = jax.random.split(self.make_rng("dropout"), cfg.depth)
        params = self.variables["params"]
        blocks = [(params[f"block_{i}"], rates[i], keys[i]) for i in range(cfg.depth)]

        def run(x: Array, windowed: bool, entries: PyTree) -> Array:
            rope = self._rope(grid, windowed=windowed)

            def block(x: Array, entry: tuple) -> Array:
                params, rate, key = entry
                module = Block(
                    cfg,
                    drop_path=0.0 if rate is None else rate,
                    window=cfg.window_size if windowed and not grid.exact else 0,
                    rows=grid.windows if windowed and grid.exact else 1,
                    dtype=self.dtype,
                    parent=None,
                )
                rngs = None if key is None else {"dropout": key}
                return module.apply({"params": params}, x, rope, deterministic, rngs=rngs)

            return scan_blocks(block, grid.arrange(x, windowed=windowed), entries, remat=cfg.remat)

        kinds = _windowed(cfg)
        period = next(p for p in range(1, cfg.depth + 1) if _repeats(kinds, p))
        runs = [
            (windowed, [i for i, _ in numbered])
            for windowed, numbered in itertools.groupby(enumerate(kinds[:period]), lambda x: x[1])
        ]

        def group(x: Array, stacks: list[PyTree]) -> Array:
            for (windowed, _), entries in zip(runs, stacks, strict=True):
                x = run(x, windowed, entries)
            return grid.arrange(x, windowed=False)

        starts = range(0, cfg.depth, period)
        stacks = [
            stack_blocks([blocks[start + i] for start in starts for i in members], len(starts))
            for _, members in runs
        ]
        return scan_blocks(group, x, stacks, remat=False)

    def _rope(self, grid: Grid, *, windowed: bool) -> Rope:
        """Positions within a window; over a whole map they are scaled to a window's."""
        cfg, side = self.config, grid.side
        head_dim = cfg.dim // cfg.num_heads
        if windowed:
            return axial_rope(side, side, head_dim, theta=cfg.rope_theta)
        return axial_rope(
            grid.height,
            grid.width,
            head_dim,
            theta=cfg.rope_theta,
            scale_y=side / grid.height,
            scale_x=side / grid.width,
        )


class Grid(NamedTuple):
    """Cells of a map, and the side of the windows that it is cut into."""

    height: int
    width: int
    side: int

    @property
    def exact(self) -> bool:
        """Whether windows need no padding; else every block pads and cuts for itself."""
        return self.height % self.side == 0 and self.width % self.side == 0

    @property
    def windows(self) -> int:
        """Whole windows a map."""
        return (self.height // self.side) * (self.width // self.side)

    def arrange(self, x: Float[Array, "b h w d"], *, windowed: bool) -> Float[Array, "b2 h2 w2 d"]:
        """``x`` as windows (where they are exact) or as whole maps, whichever of them it is."""
        cut = windowed and self.exact
        if x.shape[1:3] == ((self.side, self.side) if cut else (self.height, self.width)):
            return x
        if cut:
            return shard_batch(windows.partition(x, self.side))
        return shard_batch(windows.unpartition(x, self.height, self.width))


def _windowed(config: VisionConfig) -> list[bool]:
    """Whether a block attends within windows only."""
    return [i not in config.global_blocks for i in range(config.depth)]


def _repeats(kinds: list[bool], period: int) -> bool:
    return kinds == kinds[:period] * (len(kinds) // period)
