"""Tracker: interactive head, object pointers and memory (paper section 3).

Upstream: ``sam3/model/sam3_tracker_base.py``.

On single images only the interactive head runs (``click``). In video a frame's map first reads an
object's memory (``track``), and what was found becomes memory again (``encode_memory``). Which
memories a frame reads is ``sam3_jax.tracking``'s business; here they are plain arrays.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sam3_jax.config import ModelConfig
from sam3_jax.models.convolutions import Conv
from sam3_jax.models.layers import Embedding, Head, Linear
from sam3_jax.models.memory import FusedMaskEncoder, MemoryAttention
from sam3_jax.models.sam_heads import NOT_A_POINT, MaskDecoder, PromptEncoder
from sam3_jax.ops.masks import stability_score
from sam3_jax.ops.position import sine_grid
from sam3_jax.ops.rope import Rope, axial_rope
from sam3_jax.types import ClickOutput, ClickPrompt, Levels

ABSENT = -1024.0  # mask logit everywhere of an object that is not in the frame


class Recall(NamedTuple):
    """What S objects remember, as one frame reads it.

    ``rows``: row of the temporal embedding of each map, -1 where it is not read. ``times``:
    temporal position of each pointer, 1 is the furthest that was trained.
    """

    maps: Float[Array, "s k h w c"]
    rows: Int[Array, "s k"]
    pointers: Float[Array, "s p d"]
    times: Float[Array, "s p"]
    pointer_mask: Bool[Array, "s p"]


class Tracked(NamedTuple):
    """One mask an object: logits at the finest level's side, -1024 where the object is absent.

    ``pointers`` is the learned absence where ``object_logits`` is not positive.
    """

    masks: Float[Array, "s h w"]
    iou: Float[Array, " s"]
    object_logits: Float[Array, " s"]
    pointers: Float[Array, "s d"]


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

    def condition(
        self, coarse: Float[Array, "#s h w d"], recall: Recall, *, deterministic: bool = True
    ) -> Float[Array, "s h w d"]:
        """One frame's map, or one for each object, as it looks to who remembers ``recall``.

        Upstream: ``_prepare_memory_conditioned_features``. Maps are rotated like the frame's own
        cells, pointers (parted into tokens of the memory's width) are not.
        """
        cfg = self.config
        slots, maps, height, width, dim = recall.maps.shape
        parts = cfg.dim // dim
        times = _sine_halves(recall.times, cfg.dim)
        times = repeat(self.pointer_time_proj(times), "s p c -> s (p n) c", n=parts)
        table = self.memory_time_embed()[jnp.maximum(recall.rows, 0)]
        cells = rearrange(sine_grid(height, width, dim), "h w c -> 1 1 (h w) c")
        cells = rearrange(cells + table[:, :, None], "s k n c -> s (k n) c")
        tokens = [
            rearrange(recall.maps, "s k h w c -> s (k h w) c").astype(self.dtype),
            rearrange(recall.pointers, "s p (n c) -> s (p n) c", c=dim).astype(self.dtype),
        ]
        mask = [
            repeat(recall.rows >= 0, "s k -> s (k n)", n=height * width),
            repeat(recall.pointer_mask, "s p -> s (p n)", n=parts),
        ]
        rope = axial_rope(
            height, width, cfg.dim // cfg.memory.attention_heads, theta=cfg.memory.rope_theta
        )
        rest = np.zeros((tokens[1].shape[1], rope.cos.shape[1]), np.float32)
        key_rope = Rope(  # tiled in the program: as a constant it would be tens of megabytes
            jnp.concatenate([jnp.tile(rope.cos, (maps, 1)), rest + 1]),
            jnp.concatenate([jnp.tile(rope.sin, (maps, 1)), rest]),
        )
        flat = rearrange(coarse, "b h w d -> b (h w) d")
        out = self.memory_attention(
            jnp.broadcast_to(flat, (slots, *flat.shape[1:])),
            jnp.asarray(rearrange(sine_grid(height, width, cfg.dim), "h w d -> 1 (h w) d")),
            jnp.concatenate(tokens, axis=1),
            jnp.concatenate([cells, times], axis=1),
            jnp.concatenate(mask, axis=1),
            rope,
            key_rope,
            deterministic=deterministic,
        )
        return rearrange(out, "s (h w) d -> s h w d", h=height)

    def track(self, levels: Levels, recall: Recall, *, multimask: bool) -> Tracked:
        """Finds remembered objects in one frame, without prompts on it.

        Args:
          levels: projected pyramid of the frame.
          multimask: choose among three masks instead of taking the single one.
        """
        fine, middle, coarse = levels
        coarse = self.condition(coarse, recall)
        slots = len(recall.rows)
        prompt = self._no_points(slots, fine.shape[1:3])
        output = self.heads((*_spread((fine, middle), slots), coarse), prompt)
        return self.decide(output, jnp.full(slots, multimask))

    def decide(self, output: ClickOutput, multimask: Bool[Array, " p"]) -> Tracked:
        """One mask of each object's hypotheses, and its pointer.

        With ``multimask`` the best of three by the model's estimate; else the single one, which
        gives way to that best where it is not stable, while the pointer stays the single one's.
        """
        cfg = self.config.sam
        best = 1 + jnp.argmax(output.iou[:, 1:], axis=1)
        stable = stability_score(output.masks[:, 0], cfg.stability_delta) >= cfg.stability_threshold
        index = jnp.where(~multimask & stable, 0, best)
        present = output.object_logits > 0
        masks = jnp.where(present[:, None, None], _take(output.masks, index), ABSENT)
        token = _take(output.tokens, jnp.where(multimask, best, 0))
        pointers = self.object_pointer(token, output.object_logits)
        return Tracked(masks, _take(output.iou, index), output.object_logits, pointers)

    def mask_pointer(self, levels: Levels, masks: Float[Array, "s h w"]) -> Float[Array, "s d"]:
        """Pointers of objects that are given by masks on one frame.

        Args:
          levels: projected pyramid of the frame. The map is read as it is: neither memory nor its
            learned absence.
          masks: 0..1 at four times the finest level's sides.
        """
        prompt = self._no_points(len(masks), levels[0].shape[1:3])
        logits = self.mask_downsample(masks[..., None])[..., 0]
        prompt = prompt._replace(mask_input=logits, has_mask=jnp.ones(len(masks), bool))
        output = self.heads(_spread(levels, len(masks)), prompt)
        pointers = self.object_pointer(output.tokens[:, 0], output.object_logits)
        present = (masks > 0).any(axis=(1, 2))[:, None]
        return jnp.where(present, pointers, self.no_object_pointer()[0])

    def encode_memory(
        self,
        coarse: Float[Array, "#s h w d"],
        masks: Float[Array, "s mh mw"],
        present: Bool[Array, " s"],
    ) -> Float[Array, "s h w c"]:
        """Memory maps of objects in one frame, or each in its own.

        Args:
          masks: as the encoder was trained on them: probability x 20 - 10. Sides that are not 16
            times the map's are resized.
          present: where False, the map says so by a learned embedding.
        """
        coarse = jnp.broadcast_to(coarse, (len(masks), *coarse.shape[1:]))
        memory = self.memory_encoder(coarse, masks[..., None])
        absent = jnp.where(present[:, None], 0.0, self.no_object_embed())
        return memory + absent[:, None, None].astype(memory.dtype)

    def _no_points(self, slots: int, size: tuple[int, int]) -> ClickPrompt:
        """The empty prompt of video: one "not a point" token besides the one always appended."""
        return ClickPrompt(
            jnp.zeros((slots, 1, 2)),
            jnp.full((slots, 1), NOT_A_POINT, jnp.int32),
            jnp.zeros((slots, *size)),
            jnp.zeros(slots, bool),
        )

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


def _spread(levels: Levels, slots: int) -> Levels:
    """One frame's levels, seen by every object."""
    return tuple(jnp.broadcast_to(level, (slots, *level.shape[1:])) for level in levels)


def _take(values: Float[Array, "p m ..."], index: Int[Array, " p"]) -> Float[Array, "p ..."]:
    return jax.vmap(lambda v, i: v[i])(values, index)


def _sine_halves(x: Float[Array, "*n"], dim: int) -> Float[Array, "*n d"]:
    """All sines, then all cosines, without a factor 2 pi (upstream ``get_1d_sine_pe``)."""
    pair = np.arange(dim // 2) // 2
    angle = x.astype(jnp.float32)[..., None] / np.float32(10000.0) ** (4 * pair / np.float32(dim))
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
