"""Finds and segments things in one image at a time (upstream ``sam3/model/sam3_image_processor.py``
and ``sam1_task_predictor.py``).

A thin shell around the four entry points of the model: it compiles each of them once for a few
padded sizes, keeps what can be used again (the image's features, the phrases'), and turns the
outputs into pixels of the original image.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from sam3_jax import checkpoint
from sam3_jax.config import ModelConfig
from sam3_jax.data.images import ImageSource, load_image, to_model_input
from sam3_jax.inference import compile_cache, postprocess
from sam3_jax.inference.postprocess import Detections
from sam3_jax.inference.programs import RawOutput, compile_programs, compute_dtype, take_masks
from sam3_jax.inference.prompts import (
    Prompt,
    Values,
    bucket,
    click_prompt,
    pad_geometry,
    phrase_of,
)
from sam3_jax.models.detector import Sam3
from sam3_jax.sharding import on_one_device, param_shardings
from sam3_jax.tokenizer import default_tokenizer
from sam3_jax.types import Levels, TextFeatures

PROMPT_BUCKETS = (1, 2, 4)  # more prompts are grounded in groups: each needs 0.5 GB for its maps
KEPT_BUCKETS = (1, 4, 16, 64, 256)  # masks that leave the device together
PHRASES_KEPT = 256  # features of the latest phrases, 32 KB each
LOW_RES_CLAMP = 32.0  # of the logits that a click returns for refinement


class ClickResult(NamedTuple):
    """Hypotheses for the object that was clicked on: 3, or 1 without ``multimask``."""

    masks: Bool[np.ndarray, "n h w"]  # at the size of the original image
    iou: Float[np.ndarray, " n"]  # the model's own estimate of each mask's quality
    low_res_logits: Float[np.ndarray, "n s s"]  # one of them is the next click's mask_input


@dataclasses.dataclass
class _Encoded:
    """The image at hand; the pyramids are made when they are first needed."""

    size: tuple[int, int]  # (height, width) of the original
    trunk: Array
    detector: Levels | None = None
    tracker: Levels | None = None


class ImagePredictor:
    """Segments one image by concepts (:meth:`predict`) or by clicks (:meth:`predict_points`).

    >>> predictor = ImagePredictor.from_pretrained("sam3_jax_ckpt")
    >>> predictor.set_image("photo.jpg")
    >>> cats = predictor.predict(text="cat")
    >>> cats.masks.shape, cats.boxes.shape, cats.scores
    """

    def __init__(
        self,
        params: dict,
        config: ModelConfig,
        *,
        dtype: Any = "auto",
        mesh: Mesh | None = None,
    ):
        """Wraps parameters that are in memory already.

        Args:
          params: nested dictionary of arrays, as :func:`sam3_jax.checkpoint.load` gives it.
          config: the model they belong to.
          dtype: of computation; "auto" is bfloat16 on accelerators and float32 on CPUs.
          mesh: devices to spread the parameters over (:func:`sam3_jax.sharding.make_mesh`).
        """
        self.config = config
        self.dtype = compute_dtype(dtype)
        self._params = jax.device_put(params, param_shardings(params, mesh) if mesh else None)
        self._run = compile_programs(Sam3(config, self.dtype), mesh)
        self._tokenize = default_tokenizer()
        self._phrases: collections.OrderedDict[str, TextFeatures] = collections.OrderedDict()
        self._encoded: _Encoded | None = None

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, dtype: Any = "auto", mesh: Mesh | None = None
    ) -> ImagePredictor:
        """Loads a converted checkpoint.

        Compiled programs are kept on disk from then on (see ``inference/compile_cache.py``).

        Args:
          path: folder that ``convert_torch_weights.py`` wrote.
          dtype: of computation: "auto", "bfloat16" or "float32".
          mesh: devices to spread the parameters over (:func:`sam3_jax.sharding.make_mesh`); None
            uses one.

        Raises:
          CheckpointError: when there is no usable checkpoint at ``path``.
          ValueError: on an unknown ``dtype``.
        """
        compute = compute_dtype(dtype)
        compile_cache.enable()
        loaded = checkpoint.load(
            path,
            # The backbones' matrices in the dtype that they are multiplied in: half the memory.
            dtype=None if compute == jnp.float32 else compute,
            # Straight onto the devices: through NumPy there would be two copies of everything.
            shardings=functools.partial(param_shardings, mesh=mesh) if mesh else on_one_device,
        )
        return cls(loaded.params, loaded.config, dtype=dtype, mesh=mesh)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the image at hand, in pixels."""
        return self._image().size

    def set_image(self, image: ImageSource) -> None:
        """Encodes an image; every prediction that follows is about it.

        Args:
          image: a file's path, a PIL image, or H x W x 3 uint8 RGB.

        Raises:
          ImageError: when it cannot be read; the image before stays in place.
        """
        pixels = load_image(image)
        side = self.config.image_size
        trunk = self._run.trunk(self._params, to_model_input(pixels, (side, side))[None])
        self._encoded = _Encoded(pixels.shape[:2], trunk)

    def encode_text(self, phrase: str) -> TextFeatures:
        """Features of one phrase; :meth:`predict` takes them in place of the text."""
        if phrase not in self._phrases:
            token_ids = self._tokenize([phrase], self.config.text.context_length)
            self._phrases[phrase] = self._run.text(self._params, token_ids)
            if len(self._phrases) > PHRASES_KEPT:
                self._phrases.popitem(last=False)
        self._phrases.move_to_end(phrase)
        return self._phrases[phrase]

    def predict(
        self,
        text: str | TextFeatures | Sequence[str | TextFeatures] | None = None,
        boxes: Values = (),
        box_labels: Values | None = None,
        threshold: float = 0.5,
    ) -> Detections | list[Detections]:
        """Finds every instance of a concept in the image.

        Args:
          text: a noun phrase; or a list of them, each a prompt of its own, for a list of results.
          boxes: (n, 4) exemplars (x0, y0, x1, y1) in pixels of the original image. Without text
            they say alone what to look for; with a list of texts they go with each of them.
          box_labels: 1 for boxes that show the concept (default), 0 for what it is not.
          threshold: keep instances with a score above it.

        Raises:
          PromptError: on an empty or impossible prompt.
          RuntimeError: before :meth:`set_image`, or when the checkpoint lacks the weights.
        """
        one, asked = _asked(text, boxes, box_labels)
        found = self.predict_many(asked, threshold)
        return found[0] if one else found

    def predict_many(self, prompts: Sequence[Prompt], threshold: float = 0.5) -> list[Detections]:
        """Instances of each of several prompts, in their order; see :meth:`predict`."""
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be between 0 and 1, got {threshold}")
        results = []
        for count, out in self._ground(prompts):
            logits, presence, boxes = jax.device_get(
                (out.pred_logits, out.presence_logits, out.pred_boxes)
            )
            scores = postprocess.instance_scores(logits, presence)
            for i in range(count):
                kept = postprocess.select(scores[i], threshold)
                queries = np.zeros(bucket(len(kept), KEPT_BUCKETS), np.int32)
                queries[: len(kept)] = kept
                masks = np.asarray(take_masks(out.pred_masks, np.int32(i), queries))[: len(kept)]
                results.append(
                    postprocess.detections(scores[i][kept], boxes[i][kept], masks, self.image_size)
                )
        return results

    def predict_raw(
        self,
        text: str | TextFeatures | Sequence[str | TextFeatures] | None = None,
        boxes: Values = (),
        box_labels: Values | None = None,
    ) -> RawOutput | list[RawOutput]:
        """The model's outputs for the prompts of :meth:`predict`, before thresholds."""
        one, asked = _asked(text, boxes, box_labels)
        results = []
        for count, out in self._ground(asked):
            host = jax.device_get(out)
            results += [RawOutput(*(field[i] for field in host)) for i in range(count)]
        return results[0] if one else results

    def predict_points(
        self,
        points: Values | None = None,
        labels: Values | None = None,
        box: Values | None = None,
        mask_input: Values | None = None,
        multimask: bool = True,
    ) -> ClickResult:
        """Segments the one object that points, a box or an earlier mask point at.

        Args:
          points: (n, 2) pixels (x, y) of the original image.
          labels: 1 on the object (default), 0 not on it.
          box: (x0, y0, x1, y1) around the object.
          mask_input: one of the ``low_res_logits`` of an earlier call, to refine it.
          multimask: return three hypotheses (good for a single ambiguous click) or one.

        Raises:
          PromptError: on an empty or impossible prompt.
          RuntimeError: before :meth:`set_image`, or when the checkpoint lacks the weights.
        """
        self._require("tracker", part="tracker")
        image = self._image()
        frame = self.config.image_size
        prompt = click_prompt(
            points,
            labels,
            box,
            mask_input,
            size=image.size,
            frame=frame,
            mask_side=4 * (frame // self.config.vision.patch_size),
        )
        if image.tracker is None:
            image.tracker = self._run.tracker_levels(self._params, image.trunk)
        results = self._run.click(self._params, image.tracker, prompt)
        logits, iou = jax.device_get(results[bool(multimask)])
        return ClickResult(
            masks=postprocess.upscale_masks(postprocess.fill_holes(logits), image.size),
            iou=iou,
            low_res_logits=np.clip(logits, -LOW_RES_CLAMP, LOW_RES_CLAMP),
        )

    def _require(self, module: str, *, part: str) -> None:
        """A checkpoint may hold a part of the model only."""
        if module not in self._params:
            raise RuntimeError(
                f"the checkpoint has no weights for this ({module}): convert the source again "
                f"with --part all or --part {part}"
            )

    def _image(self) -> _Encoded:
        if self._encoded is None:
            raise RuntimeError("there is no image yet: call set_image first")
        return self._encoded

    def _ground(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, RawOutput]]:
        """Grounds prompts in groups; of each the number of prompts and the padded outputs."""
        self._require("decoder", part="image")
        image = self._image()
        phrases = [phrase_of(prompt) for prompt in prompts]
        if image.detector is None:
            image.detector = self._run.detector_levels(self._params, image.trunk)
        for start in range(0, len(prompts), PROMPT_BUCKETS[-1]):
            group = prompts[start : start + PROMPT_BUCKETS[-1]]
            length = bucket(len(group), PROMPT_BUCKETS)
            geometry = pad_geometry(group, image.size, length)
            texts = [
                self.encode_text(p) if isinstance(p, str) else p
                for p in phrases[start : start + len(group)]
            ]
            texts += texts[:1] * (length - len(group))
            yield len(group), self._run.ground(self._params, image.detector, texts, geometry)


def _asked(text: Any, boxes: Values, box_labels: Values | None) -> tuple[bool, list[Prompt]]:
    """Whether one result was asked for, and the prompts."""
    one = text is None or isinstance(text, str | TextFeatures)
    return one, [Prompt(t, boxes, box_labels) for t in ([text] if one else text)]
