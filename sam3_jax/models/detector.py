"""SAM 3: backbones, detector and tracker behind a few entry points.

Upstream: ``sam3/model/sam3_image.py``.

``encode_image`` and ``encode_text`` run once an image and once a phrase; ``ground`` (concept
prompts) and ``click`` (points, box, mask) pair their outputs by index. In video ``track`` finds an
object by its memory, which ``encode_memory`` and ``mask_pointer`` make. All are pure functions of
the parameters: ``Sam3(config, dtype).apply({"params": params}, ..., method="ground")``.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sam3_jax.config import ModelConfig
from sam3_jax.models.decoder import Decoder, look_inside
from sam3_jax.models.fusion import FusionEncoder
from sam3_jax.models.geometry import GeometryEncoder
from sam3_jax.models.neck import Neck
from sam3_jax.models.scoring import Scoring
from sam3_jax.models.segmentation import SegmentationHead
from sam3_jax.models.text import TextEncoder
from sam3_jax.models.tracker import Recall, Tracked, Tracker
from sam3_jax.models.vit import VisionTransformer
from sam3_jax.types import (
    ClickOutput,
    ClickPrompt,
    Geometry,
    GroundOutput,
    ImageFeatures,
    Levels,
    TextFeatures,
)


class Vision(nn.Module):
    """Trunk and the two necks."""

    config: ModelConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.trunk = VisionTransformer(self.config.vision, self.dtype)
        self.detector_neck = Neck(self.config.dim, self.dtype)
        self.tracker_neck = Neck(self.config.dim, self.dtype)


class Sam3(nn.Module):
    """The whole model. ``dtype``: compute dtype of everything that does not need float32."""

    config: ModelConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        cfg, dim = self.config, self.config.dim
        self.vision = Vision(cfg, self.dtype)
        self.text = TextEncoder(cfg.text, dim, self.dtype)
        self.geometry = GeometryEncoder(cfg.geometry, dim, self.dtype)
        self.fusion = FusionEncoder(cfg.fusion, dim, self.dtype)
        self.decoder = Decoder(cfg.decoder, dim, self.dtype)
        self.scoring = Scoring(cfg.scoring, dim)
        self.segmentation = SegmentationHead(cfg.segmentation, dim, self.dtype)
        self.tracker = Tracker(cfg, self.dtype)

    def encode_trunk(
        self, pixels: Float[Array, "b hp wp 3"], *, deterministic: bool = True
    ) -> Float[Array, "b h w c"]:
        """Images in [-1, 1], sides multiples of 14, to the ViT's map."""
        return self.vision.trunk(pixels, deterministic)

    def detector_levels(self, trunk: Float[Array, "b h w c"]) -> Levels:
        """The detector's pyramid."""
        return self.vision.detector_neck(trunk)

    def tracker_levels(self, trunk: Float[Array, "b h w c"]) -> Levels:
        """The tracker's pyramid, the two finer levels projected for the mask decoder."""
        return self.tracker.project_levels(self.vision.tracker_neck(trunk))

    def encode_image(
        self,
        pixels: Float[Array, "b hp wp 3"],
        *,
        detector: bool = True,
        tracker: bool = True,
        deterministic: bool = True,
    ) -> ImageFeatures:
        """Images in [-1, 1], sides multiples of 14, to the features that prompts are read against.

        Args:
          detector: make the pyramid that ``ground`` needs.
          tracker: make the pyramid that ``click`` needs.
        """
        trunk = self.encode_trunk(pixels, deterministic=deterministic)
        return ImageFeatures(
            trunk,
            self.detector_levels(trunk) if detector else (),
            self.tracker_levels(trunk) if tracker else (),
        )

    def encode_text(self, token_ids: Int[Array, "t n"]) -> TextFeatures:
        """Token ids, zero padded, to prompt tokens."""
        return self.text(token_ids)

    def encode_geometry(
        self, geometry: Geometry, coarse: Float[Array, "p h w d"]
    ) -> tuple[Float[Array, "p n d"], Bool[Array, "p n"]]:
        """Prompt tokens of boxes, points and masks on the coarsest maps of their images."""
        tokens, mask = self.geometry(geometry, coarse)
        return tokens.astype(self.dtype), mask

    def ground(
        self,
        levels: Levels,
        text: TextFeatures,
        geometry: Geometry,
        image_index: Int[Array, " p"] | None,
        text_index: Int[Array, " p"] | None,
        *,
        dac: bool = False,
        deterministic: bool = True,
    ) -> GroundOutput:
        """Finds every instance of P concepts.

        Args:
          levels: the detector's pyramids of B images.
          text: T encoded phrases.
          geometry: geometric part of the P prompts (see :func:`empty_geometry`).
          image_index, text_index: image and phrase of each prompt. None: prompt i is about image
            (phrase) i, as everywhere in a batch that is spread over a mesh; nothing is gathered.
          dac: add the one-to-many copies of the queries (training).
        """
        if image_index is not None:
            levels = tuple(level[image_index] for level in levels)
        if text_index is not None:
            text = TextFeatures(text.tokens[text_index], text.mask[text_index])
        tokens, token_mask = self.geometry(geometry, levels[-1], deterministic=deterministic)
        prompt = jnp.concatenate([text.tokens, tokens.astype(self.dtype)], axis=1)
        prompt_mask = jnp.concatenate([text.mask, token_mask], axis=1)

        fused = levels[len(levels) - self.config.fusion.num_levels :]
        memory, pos = self.fusion(fused, prompt, prompt_mask, deterministic=deterministic)
        grids = tuple(level.shape[1:3] for level in fused)
        out = self.decoder(
            memory, pos, grids, prompt, prompt_mask, dac=dac, deterministic=deterministic
        )
        logits = self.scoring(out.queries, prompt, prompt_mask, deterministic=deterministic)
        coarse = memory[:, -(grids[-1][0] * grids[-1][1]) :]
        masks, semantic = self.segmentation(levels, coarse, out.queries[-1], prompt, prompt_mask)
        count = self.config.decoder.num_queries
        return GroundOutput(
            pred_logits=logits[-1, :, :count],
            pred_boxes=out.boxes[-1, :, :count],
            presence_logits=out.presence_logits[-1],
            pred_masks=masks,
            semantic_seg=semantic,
            memory=memory,
            layer_logits=logits,
            layer_boxes=out.boxes,
            layer_presence=out.presence_logits,
        )

    def click(
        self, levels: Levels, prompt: ClickPrompt, image_index: Int[Array, " p"] | None
    ) -> ClickOutput:
        """Segments what P point, box or mask prompts mean, on the tracker's pyramids.

        ``image_index``: image of each prompt; None: prompt i is about image i.
        """
        return self.tracker.click(levels, prompt, image_index)

    def click_one(
        self, levels: Levels, prompt: ClickPrompt, multimask: Bool[Array, " p"]
    ) -> Tracked:
        """As ``click`` by P prompts on one frame, decided for one mask each, with its pointer.

        ``multimask``: whether to choose among three masks, as for a single point.
        """
        index = jnp.zeros(len(prompt.points), jnp.int32)
        return self.tracker.decide(self.tracker.click(levels, prompt, index), multimask)

    def track(self, levels: Levels, recall: Recall, *, multimask: bool = True) -> Tracked:
        """Finds remembered objects in one frame (see :class:`Recall`)."""
        return self.tracker.track(levels, recall, multimask=multimask)

    def mask_pointer(self, levels: Levels, masks: Float[Array, "s h w"]) -> Float[Array, "s d"]:
        """Pointers of objects that masks (0..1, 16 times the coarsest map) show on one frame."""
        return self.tracker.mask_pointer(levels, masks)

    def encode_memory(
        self,
        coarse: Float[Array, "#s h w d"],
        masks: Float[Array, "s mh mw"],
        present: Bool[Array, " s"],
    ) -> Float[Array, "s h w c"]:
        """Memory maps of objects in one frame; ``masks``: probability x 20 - 10."""
        return self.tracker.encode_memory(coarse, masks, present)

    def touch(self, pixels: Float[Array, "b hp wp 3"], token_ids: Int[Array, "t n"]) -> None:
        """Runs every part once, for ``init``."""
        features = self.encode_image(pixels)
        index = jnp.zeros(1, jnp.int32)
        text = self.encode_text(token_ids)
        geometry = empty_geometry(1, masks=int(self.config.geometry.mask_prompts))
        self.ground(features.detector, text, geometry, index, index)
        side = tuple(4 * s for s in features.tracker[2].shape[1:3])
        self.click(features.tracker, empty_click(1, 1, side), index)
        self.tracker.touch(features.tracker[2])


def empty_geometry(
    prompts: int, *, points: int = 0, boxes: int = 0, masks: int = 0, mask_side: int = 16
) -> Geometry:
    """Geometry of nothing: masked slots for the given numbers of points, boxes and masks."""

    def slots(count: int, *shape: int) -> tuple[Array, Array, Array]:
        none = jnp.zeros((prompts, count), jnp.int32)
        return jnp.zeros((prompts, count, *shape)), none, none.astype(bool)

    return Geometry(*slots(points, 2), *slots(boxes, 4), *slots(masks, mask_side, mask_side))


def empty_click(prompts: int, points: int, size: tuple[int, int]) -> ClickPrompt:
    """Click prompts of nothing: padding points, no mask. ``size``: the finest level's sides."""
    return ClickPrompt(
        jnp.zeros((prompts, points, 2)),
        jnp.full((prompts, points), -2, jnp.int32),
        jnp.zeros((prompts, *size)),
        jnp.zeros(prompts, bool),
    )


def init_params(config: ModelConfig, key: Array) -> dict:
    """Fresh parameters of all parts, as upstream initialises them.

    With ``config.decoder.spread_queries`` those of the decoder differ, see
    :func:`sam3_jax.models.decoder.look_inside`.
    """
    side = config.vision.patch_size * 2
    pixels, ids = jnp.zeros((1, side, side, 3)), jnp.zeros((1, 4), jnp.int32)
    params = Sam3(config).init(key, pixels, ids, method="touch")["params"]
    if config.decoder.spread_queries:
        params = params | {"decoder": look_inside(params["decoder"])}
    return params


def untrained_mask_params(config: ModelConfig, key: Array) -> dict:
    """Fresh values of the parameters that read mask exemplars, which no release has.

    ``config.geometry.mask_prompts`` is set. They belong under ``geometry``.
    """
    encoder = GeometryEncoder(config.geometry, config.dim)
    features = jnp.zeros((1, 4, 4, config.dim))
    params = encoder.init(key, empty_geometry(1, masks=1), features)["params"]
    return {name: value for name, value in params.items() if name.startswith("mask_")}


def init_shapes(config: ModelConfig) -> dict:
    """Names, shapes and dtypes of all parameters, without making them."""
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
