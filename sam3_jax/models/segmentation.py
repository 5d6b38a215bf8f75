"""Instance masks and semantic map (upstream ``sam3/model/maskformer_segmentation.py``)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sam3_jax.config import SegmentationConfig
from sam3_jax.models.convolutions import Conv, GroupNorm
from sam3_jax.models.layers import Attention, Head, LayerNorm, precision
from sam3_jax.ops.image import resize_nearest
from sam3_jax.types import Levels


class SegmentationHead(nn.Module):
    """Mask logits at the finest level from the fused map, the pyramid and the final queries."""

    config: SegmentationConfig
    dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        levels: Levels,
        memory: Float[Array, "p n d"],
        queries: Float[Array, "p q d"],
        prompt: Float[Array, "p m d"],
        prompt_mask: Bool[Array, "p m"],
    ) -> tuple[Float[Array, "p q h w"], Float[Array, "p h w"]]:
        """Args: ``levels``: one pyramid a prompt; ``memory``: its coarsest level, fused.

        Returns instance mask logits and semantic logits, float32.
        """
        pixels = self._decode_pixels(levels, self._read_prompt(memory, prompt, prompt_mask))
        semantic = Conv(1, 1, name="semantic")(pixels)[..., 0]
        embedding = Conv(self.dim, 1, dtype=self.dtype, name="instance")(pixels)
        kernels = Head(self.dim, self.dim, 3, dtype=self.dtype, name="mask_head")(queries)
        masks = jnp.einsum(
            "pqd,phwd->pqhw",
            kernels,
            embedding,
            precision=precision(self.dtype),
            preferred_element_type=jnp.float32,
        )
        return masks, semantic

    def _read_prompt(
        self,
        memory: Float[Array, "p n d"],
        prompt: Float[Array, "p m d"],
        prompt_mask: Bool[Array, "p m"],
    ) -> Float[Array, "p n d"]:
        y = LayerNorm(dtype=self.dtype, name="prompt_norm")(memory)
        attend = Attention(self.dim, self.config.num_heads, dtype=self.dtype, name="prompt_attn")
        return memory + attend(y, prompt, prompt, key_mask=prompt_mask)

    def _decode_pixels(
        self, levels: Levels, memory: Float[Array, "p n d"]
    ) -> Float[Array, "p h w d"]:
        """From the coarsest level up: nearest upsampling, sum, 3x3 convolution, GroupNorm, ReLU."""
        x = memory.reshape(levels[-1].shape).astype(self.dtype)
        for i, level in enumerate(reversed(levels[:-1])):
            x = level + resize_nearest(x, level.shape[1:3])
            x = Conv(self.dim, 3, pad=1, dtype=self.dtype, name=f"conv_{i}")(x)
            x = nn.relu(GroupNorm(self.config.num_groups, self.dtype, name=f"norm_{i}")(x))
        return x
