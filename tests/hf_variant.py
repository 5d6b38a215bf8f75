"""Our model as Hugging Face transformers computes SAM 3, to compare with figures it published.

The package follows upstream (facebookresearch/sam3). transformers 5.23 departs from it, in what
single images use, by the following; ``HfPredictor`` departs alike, and ``test_hf_variant.py``
holds it to transformers' own unpatched models:

- Geometry tokens exist only if a prompt of the batch has a box; upstream always gives every prompt
  the class token. So a phrase is answered differently alone and beside a prompt with a box.
- Presence logits are clamped to +-10.
- LayerNorm eps of the ViT is 1e-6 (upstream 1e-5).
- Clicks do not see the no-memory embedding: it is added to a level that is then dropped.
- Logits of a click are not clamped to +-32 before they are handed back for refinement.

What it does otherwise with videos is in ``hf_video``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sam3_jax.config import ModelConfig
from sam3_jax.inference import engine, postprocess
from sam3_jax.inference.image import ImagePredictor
from sam3_jax.inference.postprocess import ClickResult
from sam3_jax.inference.programs import RawOutput
from sam3_jax.inference.prompts import Prompt
from sam3_jax.models.detector import Sam3
from sam3_jax.models.geometry import GeometryEncoder
from sam3_jax.tracking.masks import resize
from sam3_jax.types import GroundOutput, Levels

LAYER_NORM_EPS = 1e-6
PRESENCE_CLAMP = 10.0


def _no_tokens_without_boxes(next_call, args: tuple, kwargs: dict, context: Any) -> Any:
    """Flax interceptor: a batch that has no room for boxes gets no geometry tokens."""
    out = next_call(*args, **kwargs)
    if not isinstance(context.module, GeometryEncoder) or context.method_name != "__call__":
        return out
    tokens, mask = out
    return (tokens, mask) if args[0].boxes.shape[1] else (tokens, jnp.zeros_like(mask))


class HfSam3(Sam3):
    """Sam3 with transformers' rules of when there are geometry tokens, and of mask prompts."""

    def ground(self, *args: Any, **kwargs: Any) -> GroundOutput:
        with nn.intercept_methods(_no_tokens_without_boxes):
            return super().ground(*args, **kwargs)

    def mask_pointer(self, levels: Levels, masks: jax.Array) -> jax.Array:
        """Of masks (s, h, w) at the frame's size, 0..1: the pointer of the best of three masks."""
        tracker, count, side = self.tracker, len(masks), levels[0].shape[1:3]
        logits = resize(tracker.mask_downsample(masks[..., None])[..., 0], side, antialias=True)
        prompt = tracker._no_points(count, side)
        prompt = prompt._replace(mask_input=logits, has_mask=jnp.ones(count, bool))
        spread = tuple(jnp.broadcast_to(level, (count, *level.shape[1:])) for level in levels)
        output = tracker.heads(spread, prompt)
        best = 1 + jnp.argmax(output.iou[:, 1:], axis=1)
        token = jnp.take_along_axis(output.tokens, best[:, None, None], axis=1)[:, 0]
        pointers = tracker.object_pointer(token, output.object_logits)
        present = (masks > 0).any(axis=(1, 2))[:, None]
        return jnp.where(present, pointers, tracker.no_object_pointer()[0])


def hf_config(config: ModelConfig) -> ModelConfig:
    """A copy of a configuration, for :class:`HfSam3`."""
    config = copy.deepcopy(config)
    config.vision.layer_norm_eps = LAYER_NORM_EPS
    return config


def hf_settings(params: dict, config: ModelConfig) -> tuple[dict, ModelConfig]:
    """Both for :class:`HfSam3` on single images; the arguments stay as they are."""
    nothing = jax.tree.map(jnp.zeros_like, params["tracker"]["no_memory_embed"])
    params = params | {"tracker": params["tracker"] | {"no_memory_embed": nothing}}
    return params, hf_config(config)


class HfPredictor(ImagePredictor):
    """Float32 predictor with all of the departures; see the module."""

    def __init__(self, params: dict, config: ModelConfig):
        with mock.patch.object(engine, "Sam3", HfSam3):
            super().__init__(*hf_settings(params, config), dtype="float32")

    def _ground(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, RawOutput]]:
        for count, out in super()._ground(prompts):
            presence = jnp.clip(out.presence_logits, -PRESENCE_CLAMP, PRESENCE_CLAMP)
            yield count, out._replace(presence_logits=presence)

    def predict_points(self, *args: Any, **kwargs: Any) -> ClickResult:
        with mock.patch.object(postprocess, "LOW_RES_CLAMP", np.inf):
            return super().predict_points(*args, **kwargs)

    def predict_raw_batch(self, prompts: Sequence[Prompt]) -> list[RawOutput]:
        """Raw outputs of at most 4 prompts that are answered together."""
        ((count, out),) = self._ground(prompts)
        host = jax.device_get(out)
        return [RawOutput(*(field[i] for field in host)) for i in range(count)]


class ConceptFigures(NamedTuple):
    """What transformers publishes of one concept prompt."""

    logits: np.ndarray  # (3,) the highest, without presence
    box: np.ndarray  # (4,) xyxy fractions of the query with the highest logit
    corner: np.ndarray  # (3, 3) first rows and columns of its mask logits
    score: np.ndarray  # () of the first query, in their own order, above the threshold
    pixel_box: np.ndarray  # (4,) its box, xyxy pixels of the image


def concept_figures(raw: RawOutput, size: tuple[int, int], threshold: float) -> ConceptFigures:
    """The figures of one prompt's raw outputs. ``size``: height and width of the image."""
    order = np.argsort(-raw.pred_logits, kind="stable")
    presence = np.reshape(raw.presence_logits, 1)
    (scores,) = postprocess.instance_scores(raw.pred_logits[None], presence)
    best, first = order[0], np.flatnonzero(scores > threshold)[0]
    return ConceptFigures(
        raw.pred_logits[order[:3]],
        postprocess.boxes_to_pixels(raw.pred_boxes[best : best + 1], (1, 1))[0],
        raw.pred_masks[best, :3, :3],
        scores[first],
        postprocess.boxes_to_pixels(raw.pred_boxes[first : first + 1], size)[0],
    )


class ClickFigures(NamedTuple):
    """What transformers publishes of one click prompt."""

    iou: np.ndarray  # (n,) the model's estimates, highest first
    corner: np.ndarray  # (3, 3) first rows and columns of the best mask's logits


def click_figures(iou: np.ndarray, logits: np.ndarray) -> ClickFigures:
    """The figures of a click's ``iou`` (n,) and mask ``logits`` (n, h, w)."""
    order = np.argsort(-iou, kind="stable")
    return ClickFigures(iou[order], logits[order[0], :3, :3])
