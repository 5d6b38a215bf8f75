"""Geometry encoder: points, boxes and masks as concept prompts.

Upstream: ``sam3/model/geometry_encoders.py``.

Token order: points, boxes, class token, mask tokens. The class token is always there, so that a
prompt without geometry still has one token.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sam3_jax.config import GeometryConfig
from sam3_jax.models.cross_attention import CrossAttentionLayer
from sam3_jax.models.layers import Embedding, LayerNorm, Linear
from sam3_jax.models.memory import FusedMaskEncoder
from sam3_jax.ops.boxes import cxcywh_to_xyxy
from sam3_jax.ops.image import roi_align, sample_points
from sam3_jax.ops.position import sine, sine_grid
from sam3_jax.types import Geometry


class GeometryEncoder(nn.Module):
    """Encodes the geometric part of P prompts against the stride-14 map of their images."""

    config: GeometryConfig
    dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, geometry: Geometry, features: Float[Array, "p h w d"], *, deterministic: bool = True
    ) -> tuple[Float[Array, "p n d"], Bool[Array, "p n"]]:
        """Returns tokens and their mask. Raises ValueError for masks without mask parameters."""
        cfg = self.config
        prompts, height, width = features.shape[:3]
        normed = LayerNorm(name="image_norm")(features)
        labels = Embedding(2, self.dim, name="label_embed")()
        points = self._points(geometry.points, normed) + labels[geometry.point_labels]
        boxes = self._boxes(geometry.boxes, normed) + labels[geometry.box_labels]
        cls = jnp.broadcast_to(Embedding(1, self.dim, name="class_embed")(), (prompts, 1, self.dim))
        tokens = jnp.concatenate([points, boxes, cls], axis=1)
        here = jnp.ones((prompts, 1), bool)
        mask = jnp.concatenate([geometry.point_mask, geometry.box_mask, here], axis=1)

        tokens = LayerNorm(name="norm")(Linear(self.dim, dtype=self.dtype, name="proj")(tokens))
        memory = rearrange(features, "p h w d -> p (h w) d")
        memory_pos = sine_grid(height, width, self.dim).reshape(1, -1, self.dim)
        for i in range(cfg.depth):
            tokens = CrossAttentionLayer(
                self.dim,
                cfg.num_heads,
                cfg.mlp_dim,
                cfg.dropout,
                xavier=False,
                dtype=self.dtype,
                name=f"layer_{i}",
            )(
                tokens,
                memory,
                memory_pos=jnp.asarray(memory_pos),
                mask=mask,
                deterministic=deterministic,
            )
        tokens = LayerNorm(name="norm_final")(tokens).astype(self.dtype)
        return self._with_masks(tokens, mask, geometry, features)

    def _points(
        self, points: Float[Array, "p n 2"], normed: Float[Array, "p h w d"]
    ) -> Float[Array, "p n d"]:
        """Sum of the coordinates, the feature below and the sine (x first, unlike boxes)."""
        sampled = sample_points(normed, points)
        position = jnp.concatenate([sine(points[..., i], self.dim // 2) for i in (0, 1)], axis=-1)
        return (
            Linear(self.dim, name="point_direct")(points)
            + Linear(self.dim, dtype=self.dtype, name="point_pool")(sampled)
            + Linear(self.dim, dtype=self.dtype, name="point_sine")(position)
        )

    def _boxes(
        self, boxes: Float[Array, "p n 4"], normed: Float[Array, "p h w d"]
    ) -> Float[Array, "p n d"]:
        """Sum of the coordinates, a 7x7 convolution over RoIAlign and the sine of the centre.

        The coordinates stay float32: bfloat16 has steps of 4 pixels at 1008.
        """
        height, width = normed.shape[1:3]
        cells = cxcywh_to_xyxy(boxes) * np.array([width, height, width, height], np.float32)
        pooled = roi_align(normed, cells, self.config.roi_size)
        x, y, w, h = jnp.unstack(boxes, axis=-1)
        position = jnp.concatenate(
            [sine(y, self.dim // 2), sine(x, self.dim // 2), h[..., None], w[..., None]], axis=-1
        )
        return (
            Linear(self.dim, name="box_direct")(boxes)
            + Linear(self.dim, in_axes=3, dtype=self.dtype, name="box_pool")(pooled)
            + Linear(self.dim, name="box_sine")(position)
        )

    def _with_masks(
        self,
        tokens: Float[Array, "p n d"],
        mask: Bool[Array, "p n"],
        geometry: Geometry,
        features: Float[Array, "p h w d"],
    ) -> tuple[Float[Array, "p n2 d"], Bool[Array, "p n2"]]:
        """Appends the mask prompts' cells; a prompt of masks alone drops its class token."""
        count = geometry.masks.shape[1]
        if not count:
            return tokens, mask
        if not self.config.mask_prompts:
            raise ValueError(
                "mask prompts need geometry.mask_prompts=True in the model's configuration "
                "(the released checkpoint has no weights for them)"
            )
        labels = Embedding(2, self.dim, name="mask_label_embed")()
        masks = rearrange(geometry.masks, "p m h w -> (p m) h w 1")
        cells = FusedMaskEncoder(self.dim, self.dim, dtype=self.dtype, name="mask_encoder")(
            jnp.repeat(features, count, axis=0), masks
        )
        cells = cells + sine_grid(*cells.shape[1:3], self.dim).astype(cells.dtype)
        cells = rearrange(cells, "(p m) h w d -> p m (h w) d", m=count)
        cells = cells + labels[geometry.mask_labels].astype(cells.dtype)[:, :, None]
        cell_mask = jnp.broadcast_to(geometry.mask_mask[..., None], cells.shape[:3])
        others = geometry.point_mask.any(axis=1) | geometry.box_mask.any(axis=1)
        keep = others | ~geometry.mask_mask.any(axis=1)
        return (
            jnp.concatenate([tokens, rearrange(cells, "p m n d -> p (m n) d")], axis=1),
            jnp.concatenate(
                [mask & keep[:, None], rearrange(cell_mask, "p m n -> p (m n)")], axis=1
            ),
        )
