"""Simple feature pyramid over the ViT map (upstream ``sam3/model/necks.py``).

Detector and tracker own one each. Levels have stride 14/4, 14/2 and 14; upstream's fourth level
is computed and dropped there, here it does not exist.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sam3_jax.models.convolutions import Conv, Upsample2x
from sam3_jax.models.layers import gelu
from sam3_jax.types import Levels


class Neck(nn.Module):
    """Map of the trunk to three levels of width ``dim``, finest first."""

    dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, trunk: Float[Array, "b h w c"]) -> Levels:
        wide = trunk.shape[-1]
        x4 = Upsample2x(wide // 2, self.dtype, name="level_0_up_0")(trunk)
        x4 = Upsample2x(wide // 4, self.dtype, name="level_0_up_1")(gelu(x4))
        x2 = Upsample2x(wide // 2, self.dtype, name="level_1_up_0")(trunk)
        levels = []
        for i, x in enumerate((x4, x2, trunk)):
            x = Conv(self.dim, 1, dtype=self.dtype, name=f"level_{i}_conv_1x1")(x)
            x = Conv(self.dim, 3, pad=1, dtype=self.dtype, name=f"level_{i}_conv_3x3")(x)
            levels.append(x)
        return tuple(levels)
