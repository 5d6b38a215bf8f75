"""Interactive head: SAM prompt encoder and two-way mask decoder (upstream ``sam3/sam/``)."""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sam3_jax.config import SamConfig
from sam3_jax.models.convolutions import Conv, Upsample2x
from sam3_jax.models.layers import Attention, Embedding, Head, LayerNorm, Mlp, gelu, precision
from sam3_jax.ops.masks import stability_score
from sam3_jax.types import ClickOutput

NOT_A_POINT, PADDING = -1, -2  # labels without coordinates, see ClickPrompt


class PromptEncoder(nn.Module):
    """Points and mask inputs to sparse and dense embeddings (``sam/prompt_encoder.py``)."""

    config: SamConfig
    dim: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.gaussian = self.param("gaussian", nn.initializers.normal(1.0), (2, self.dim // 2))
        self.point_embed = Embedding(4, self.dim)
        self.not_a_point_embed = Embedding(1, self.dim)
        self.no_mask_embed = Embedding(1, self.dim)
        channels = self.config.mask_channels
        self.mask_conv_0 = Conv(channels // 4, 2, stride=2, dtype=self.dtype)
        self.mask_norm_0 = LayerNorm(eps=1e-6, dtype=self.dtype)
        self.mask_conv_1 = Conv(channels, 2, stride=2, dtype=self.dtype)
        self.mask_norm_1 = LayerNorm(eps=1e-6, dtype=self.dtype)
        self.mask_conv_2 = Conv(self.dim, 1, dtype=self.dtype)

    def _encode_positions(self, xy: Float[Array, "*n 2"]) -> Float[Array, "*n d"]:
        """Random Fourier features of (x, y) fractions, float32."""
        angle = jnp.dot(2.0 * xy - 1.0, self.gaussian, precision="highest") * (2.0 * math.pi)
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)

    def grid_positions(self, height: int, width: int) -> Float[Array, "h w d"]:
        """Code of the centre of every cell."""
        y = (np.arange(height, dtype=np.float32) + 0.5) / height
        x = (np.arange(width, dtype=np.float32) + 0.5) / width
        return self._encode_positions(jnp.stack(jnp.meshgrid(x, y), axis=-1))

    def points(
        self, points: Float[Array, "p n 2"], labels: Int[Array, "p n"], size: tuple[int, int]
    ) -> tuple[Float[Array, "p n1 d"], Bool[Array, "p n1"]]:
        """Tokens of the points, then one "not a point"; both masked where a prompt has no point.

        ``size``: (height, width) of the input frame that the points are pixels of.
        """
        scale = np.array([size[1], size[0]], np.float32)
        code = self._encode_positions((points.astype(jnp.float32) + 0.5) / scale)
        code = code + self.point_embed()[jnp.maximum(labels, 0)]
        blank = self.not_a_point_embed()[0]
        tokens = jnp.where((labels >= 0)[..., None], code, blank)
        mask = labels != PADDING
        last = jnp.broadcast_to(blank, (tokens.shape[0], 1, self.dim))
        return (
            jnp.concatenate([tokens, last], axis=1),
            jnp.concatenate([mask, mask.any(axis=1, keepdims=True)], axis=1),
        )

    def masks(
        self, masks: Float[Array, "p h w"], has_mask: Bool[Array, " p"]
    ) -> Float[Array, "p h4 w4 d"]:
        """Dense embedding of mask logits at four times the grid; the no-mask one elsewhere."""
        x = gelu(self.mask_norm_0(self.mask_conv_0(masks[..., None])))
        x = self.mask_conv_2(gelu(self.mask_norm_1(self.mask_conv_1(x))))
        return jnp.where(has_mask[:, None, None, None], x, self.no_mask_embed()[0].astype(x.dtype))


class TwoWayBlock(nn.Module):
    """Tokens read themselves and the image, the image reads the tokens (``sam/transformer.py``)."""

    config: SamConfig
    dim: int
    first: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "p n d"],
        image: Float[Array, "p m d"],
        token_pos: Float[Array, "p n d"],
        image_pos: Float[Array, "#p m d"],
        token_mask: Bool[Array, "p n"],
    ) -> tuple[Float[Array, "p n d"], Float[Array, "p m d"]]:
        attend = functools.partial(sam_attention, self.config, self.dim, self.dtype)
        q = tokens if self.first else tokens + token_pos
        y = attend("self_attn", downsample=False)(q, q, tokens, key_mask=token_mask)
        # The first block has neither positions nor a residual here.
        tokens = LayerNorm(name="norm1")(y if self.first else tokens + y)
        y = attend("token_to_image")(tokens + token_pos, image + image_pos, image)
        tokens = LayerNorm(name="norm2")(tokens + y)
        mlp = Mlp(self.config.mlp_dim, self.dim, nn.relu, dtype=self.dtype, name="mlp")
        tokens = LayerNorm(name="norm3")(tokens + mlp(tokens))
        y = attend("image_to_token")(
            image + image_pos, tokens + token_pos, tokens, key_mask=token_mask
        )
        return tokens, LayerNorm(name="norm4")(image + y)


def sam_attention(
    config: SamConfig,
    dim: int,
    dtype: DTypeLike,
    name: str | None = None,
    *,
    downsample: bool = True,
) -> Attention:
    """SAM's attention layer: PyTorch's linear defaults, narrower inside unless told not to be."""
    return Attention(
        dim,
        config.num_heads,
        dim // config.attention_downsample if downsample else dim,
        init="torch",
        out_init="torch",
        dtype=dtype,
        name=name,
    )


class MaskDecoder(nn.Module):
    """Two-way transformer, hypernetwork masks, IoU and object score (``sam/mask_decoder.py``)."""

    config: SamConfig
    dim: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        cfg, dim, dtype = self.config, self.dim, self.dtype
        self.object_token, self.iou_token = Embedding(1, dim), Embedding(1, dim)
        self.mask_tokens = Embedding(1 + cfg.num_multimask, dim)
        self.blocks = [TwoWayBlock(cfg, dim, i == 0, dtype) for i in range(cfg.depth)]
        self.final_attn = sam_attention(cfg, dim, dtype)
        self.norm_final = LayerNorm()
        self.upscale_0, self.upscale_1 = Upsample2x(dim // 4, dtype), Upsample2x(dim // 8, dtype)
        self.upscale_norm = LayerNorm(eps=1e-6, dtype=dtype)
        self.level_conv_0, self.level_conv_1 = (
            Conv(dim // 8, 1, dtype=dtype),
            Conv(dim // 4, 1, dtype=dtype),
        )
        self.hypernetworks = [
            Head(dim, dim // 8, 3, dtype=dtype) for _ in range(1 + cfg.num_multimask)
        ]
        self.iou_head = Head(dim, 1 + cfg.num_multimask, 3)
        self.object_head = Head(dim, 1, 3)

    def project_levels(
        self, fine: Float[Array, "b h0 w0 d"], middle: Float[Array, "b h1 w1 d"]
    ) -> tuple[Float[Array, "b h0 w0 d8"], Float[Array, "b h1 w1 d4"]]:
        """1x1 convolutions of the two finer levels, once an image and not once a click."""
        return self.level_conv_0(fine), self.level_conv_1(middle)

    def __call__(
        self,
        fine: Float[Array, "p h0 w0 d8"],
        middle: Float[Array, "p h1 w1 d4"],
        image: Float[Array, "p h w d"],
        image_pos: Float[Array, "h w d"],
        points: Float[Array, "p n d"],
        point_mask: Bool[Array, "p n"],
    ) -> ClickOutput:
        """``image``: stride-14 map plus dense prompt; ``fine``, ``middle``: projected levels."""
        prompts, height, width = image.shape[:3]
        own = jnp.concatenate([self.object_token(), self.iou_token(), self.mask_tokens()])
        own = jnp.broadcast_to(own, (prompts, *own.shape))
        token_pos = jnp.concatenate([own, points], axis=1)
        mask = jnp.concatenate([jnp.ones(own.shape[:2], bool), point_mask], axis=1)
        tokens, flat = token_pos, rearrange(image, "p h w d -> p (h w) d").astype(jnp.float32)
        pos = rearrange(image_pos, "h w d -> 1 (h w) d")
        for block in self.blocks:
            tokens, flat = block(tokens, flat, token_pos, pos, mask)
        y = self.final_attn(tokens + token_pos, flat + pos, flat)
        tokens = self.norm_final(tokens + y)

        x = self.upscale_0(flat.reshape(prompts, height, width, self.dim)) + middle
        x = gelu(self.upscale_norm(x))
        x = gelu(self.upscale_1(x) + fine)
        mask_tokens = tokens[:, 2 : 2 + len(self.hypernetworks)]
        kernels = jnp.stack(
            [head(mask_tokens[:, i]) for i, head in enumerate(self.hypernetworks)], axis=1
        )
        masks = jnp.einsum(
            "pmd,phwd->pmhw",
            kernels,
            x,
            precision=precision(self.dtype),
            preferred_element_type=jnp.float32,
        )
        return ClickOutput(
            masks,
            nn.sigmoid(self.iou_head(tokens[:, 1])),
            self.object_head(tokens[:, 0])[..., 0],
            mask_tokens,
        )


def select_masks(
    output: ClickOutput, config: SamConfig, *, multimask: bool
) -> tuple[Float[Array, "p k h w"], Float[Array, "p k"]]:
    """Masks and IoU that a caller sees: hypotheses 1..3, or the single one.

    The single mask gives way to the best of the three where it is not stable (upstream
    ``_dynamic_multimask_via_stability``; inference only).
    """
    if multimask:
        return output.masks[:, 1:], output.iou[:, 1:]
    best = 1 + jnp.argmax(output.iou[:, 1:], axis=1)
    score = stability_score(output.masks[:, 0], config.stability_delta)
    index = jnp.where(score >= config.stability_threshold, 0, best)

    def take(values: Array) -> Array:
        return jax.vmap(lambda v, i: v[i][None])(values, index)

    return take(output.masks), take(output.iou)
