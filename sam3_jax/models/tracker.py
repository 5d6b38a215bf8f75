"""Tracker: interactive head, object pointers and memory (paper section 3).

Upstream: ``sam3/model/sam3_tracker_base.py``.

On single images only the interactive head runs; the memory parts have their parameters here and
serve video.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sam3_jax.config import ModelConfig
from sam3_jax.models.layers import Conv, Embedding, Head, Linear
from sam3_jax.models.memory import FusedMaskEncoder, MemoryAttention
from sam3_jax.models.sam_heads import MaskDecoder, PromptEncoder
from sam3_jax.ops.rope import axial_rope
from sam3_jax.types import ClickOutput, ClickPrompt, Levels


class Tracker(nn.Module):
    """Everything under ``tracker.*`` of the released checkpoint but its neck."""

    config: ModelConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        cfg, dim = self.config, self.config.dim
        self.prompt_encoder = PromptEncoder(cfg.sam, dim, self.dtype)
        self.mask_decoder = MaskDecoder(cfg.sam, dim, self.dtype)
        self.memory_encoder = FusedMaskEncoder(
            dim, cfg.memory.dim, cfg.memory.fuser_depth, self.dtype
        )
        self.memory_attention = MemoryAttention(cfg.memory, dim, self.dtype)
        self.mask_downsample = Conv(1, 4, stride=4)
        self.pointer_head = Head(dim, dim, 3)
        self.pointer_time_proj = Linear(cfg.memory.dim)
        # Modules of their own: a checkpoint of the interactive head alone lacks all but the first.
        table = nn.initializers.truncated_normal(0.02)
        self.no_memory_embed = Embedding(1, dim, table)
        self.no_object_pointer = Embedding(1, dim, table)
        self.no_object_embed = Embedding(1, cfg.memory.dim, table)
        self.memory_time_embed = Embedding(cfg.memory.num_maps, cfg.memory.dim, table)

    def project_levels(self, levels: Levels) -> Levels:
        """Pyramid of the neck to what the mask decoder reads: dim/8, dim/4 and dim channels."""
        fine, middle = self.mask_decoder.project_levels(*levels[:2])
        return fine, middle, levels[2]

    def heads(self, levels: Levels, prompt: ClickPrompt) -> ClickOutput:
        """Prompt encoder and mask decoder on one (projected) pyramid a prompt.

        The coarsest level already holds what memory attention, or its absence, makes of it.
        """
        fine, middle, coarse = levels
        height, width = coarse.shape[1:3]
        patch = self.config.vision.patch_size
        points, mask = self.prompt_encoder.points(
            prompt.points, prompt.labels, (height * patch, width * patch)
        )
        dense = self.prompt_encoder.masks(prompt.mask_input, prompt.has_mask)
        pos = self.prompt_encoder.grid_positions(height, width)
        return self.mask_decoder(fine, middle, coarse + dense, pos, points, mask)

    def click(
        self, levels: Levels, prompt: ClickPrompt, image_index: Int[Array, " p"] | None
    ) -> ClickOutput:
        """Interactive segmentation of single images: no memory, its learned absence instead.

        Args:
          levels: projected pyramids of B images.
          image_index: image of each of the P prompts; None: prompt i is about image i.
        """
        if image_index is not None:
            levels = tuple(level[image_index] for level in levels)
        fine, middle, coarse = levels
        coarse = coarse + self.no_memory_embed()[0].astype(coarse.dtype)
        return self.heads((fine, middle, coarse), prompt)

    def object_pointer(
        self, token: Float[Array, "p d"], object_logits: Float[Array, " p"]
    ) -> Float[Array, "p d"]:
        """Pointer of a mask token; the no-object pointer where the logit is <= 0."""
        present = (object_logits > 0)[:, None]
        return jnp.where(present, self.pointer_head(token), self.no_object_pointer()[0])

    def touch(self, coarse: Float[Array, "b h w d"]) -> None:
        """Calls what single images do not use, so that ``init`` makes its parameters."""
        batch, height, width = coarse.shape[:3]
        cfg = self.config
        mask = jnp.zeros((batch, 16 * height, 16 * width, 1))
        memory = self.memory_encoder(coarse, mask).reshape(batch, -1, cfg.memory.dim)
        flat = coarse.reshape(batch, -1, cfg.dim)
        rope = axial_rope(height, width, cfg.dim // cfg.memory.attention_heads)
        seen = jnp.ones(memory.shape[:2], bool)
        zeros = jnp.zeros_like(memory)
        self.memory_attention(flat, jnp.zeros_like(flat), memory, zeros, seen, rope, rope)
        self.mask_downsample(mask)
        self.object_pointer(flat[:, 0], jnp.ones(batch))
        self.pointer_time_proj(flat[:, :1])
        self.no_object_embed()
        self.memory_time_embed()
