"""Finds and segments things in one image at a time (upstream ``sam3/model/sam3_image_processor.py``
and ``sam1_task_predictor.py``).

A thin shell around the engine: it keeps what can be used again (the image's features) and turns
the outputs into pixels of the original image.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from sam3_jax.config import ModelConfig
from sam3_jax.data.images import ImageSource, load_image, resize_image
from sam3_jax.inference import postprocess
from sam3_jax.inference.engine import PROMPT_BUCKETS, Engine
from sam3_jax.inference.image_batch import predict_batch
from sam3_jax.inference.instances import Kept, keep_instances
from sam3_jax.inference.options import DEFAULTS, Options
from sam3_jax.inference.postprocess import ClickResult, Detections
from sam3_jax.inference.programs import RawOutput
from sam3_jax.inference.prompts import (
    Prompt,
    Values,
    click_prompt,
    phrase_of,
    point_prompts,
)
from sam3_jax.types import Levels, TextFeatures


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
        resolution: int | None = None,
    ):
        """Wraps parameters that are in memory already.

        Args:
          params: nested dictionary of arrays, as :func:`sam3_jax.checkpoint.load` gives it.
          config: the model they belong to.
          dtype: of computation; "auto" is bfloat16 on accelerators and float32 on CPUs.
          mesh: devices to spread parameters and batches over (:func:`sam3_jax.sharding.make_mesh`).
          resolution: side of the square that images are resized to, a multiple of 14; None: what
            the model was trained at (1008).

        Raises:
          ValueError: on an unknown ``dtype`` or an impossible ``resolution``.
        """
        self.engine = Engine(params, config, dtype=dtype, mesh=mesh, resolution=resolution)
        self._encoded: _Encoded | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        dtype: Any = "auto",
        mesh: Mesh | None = None,
        *,
        resolution: int | None = None,
    ) -> ImagePredictor:
        """Loads a converted checkpoint.

        Compiled programs are kept on disk from then on (see ``inference/compile_cache.py``).

        Args:
          path: folder that ``convert_torch_weights.py`` wrote.
          dtype: of computation: "auto", "bfloat16" or "float32".
          mesh: devices to spread parameters and batches over; None uses one.
          resolution: see the class; smaller is quicker and finds less.

        Raises:
          CheckpointError: when there is no usable checkpoint at ``path``.
          ValueError: on an unknown ``dtype`` or an impossible ``resolution``.
        """
        return cls.from_engine(
            Engine.from_pretrained(path, dtype=dtype, mesh=mesh, resolution=resolution)
        )

    @classmethod
    def from_engine(cls, engine: Engine) -> ImagePredictor:
        """A predictor (one for each thread, say) that shares parameters and programs."""
        predictor = cls.__new__(cls)
        predictor.engine, predictor._encoded = engine, None
        return predictor

    @property
    def config(self) -> ModelConfig:
        """The model, at the resolution in use."""
        return self.engine.config

    @property
    def dtype(self) -> Any:
        """The dtype of computation."""
        return self.engine.dtype

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
        trunk = self.engine.trunk(resize_image(pixels, (side, side))[None])
        self._encoded = _Encoded(pixels.shape[:2], trunk)

    def encode_text(self, phrase: str) -> TextFeatures:
        """Features of one phrase; :meth:`predict` takes them in place of the text."""
        return self.engine.encode_text(phrase)

    def encode_exemplars(
        self,
        boxes: Values,
        box_labels: Values | None = None,
        text: str | TextFeatures | None = None,
    ) -> TextFeatures:
        """Features of what the boxes show on this image, to search *other* images for.

        They stand behind those of the phrase, and :meth:`predict` takes the whole in place of a
        text. The released model was trained with exemplars of the searched image only; across
        images its weights are used beyond their training.

        Args:
          boxes, box_labels: as in :meth:`predict`.
          text: a phrase for what they show; None: "visual", as with boxes alone.
        """
        image = self._with_detector()
        prompt = Prompt(text, boxes, box_labels)
        return self.engine.encode_exemplars(image.detector, prompt, image.size)

    def predict(
        self,
        text: str | TextFeatures | Sequence[str | TextFeatures] | None = None,
        boxes: Values = (),
        box_labels: Values | None = None,
        threshold: float = 0.5,
        *,
        options: Options = DEFAULTS,
    ) -> Detections | list[Detections]:
        """Finds every instance of a concept in the image.

        Args:
          text: a noun phrase; or a list of them, each a prompt of its own, for a list of results.
          boxes: (n, 4) exemplars (x0, y0, x1, y1) in pixels of the original image. Without text
            they say alone what to look for; with a list of texts they go with each of them.
          box_labels: 1 for boxes that show the concept (default), 0 for what it is not.
          threshold: keep instances with a score above it.
          options: presence, suppression of duplicates, number of instances, kind of boxes.

        Raises:
          PromptError: on an empty or impossible prompt.
          RuntimeError: before :meth:`set_image`, or when the checkpoint lacks the weights.
        """
        one, asked = _asked(text, boxes, box_labels)
        found = self.predict_many(asked, threshold, options=options)
        return found[0] if one else found

    def predict_many(
        self, prompts: Sequence[Prompt], threshold: float = 0.5, *, options: Options = DEFAULTS
    ) -> list[Detections]:
        """Instances of each of several prompts, in their order; see :meth:`predict`."""
        _check(threshold, options)
        kept: list[Kept] = []
        for count, out in self._ground(prompts):
            kept += keep_instances(out, [threshold] * count, options)
        tight = self.engine.boxes_from_masks(options)
        return [
            postprocess.detections(*one[:3], self.image_size, boxes_from_masks=tight)
            for one in kept
        ]

    def predict_batch(
        self,
        images: Sequence[ImageSource],
        prompts: Sequence[Prompt] | Sequence[Sequence[Prompt]],
        threshold: float = 0.5,
        *,
        options: Options = DEFAULTS,
        batch_size: int = 8,
    ) -> list[list[Detections]]:
        """Several images of any sizes at once; the image that was set stays as it is.

        Args:
          images: files, PIL images or arrays.
          prompts: the same for all images, or a list for each of them.
          batch_size: images on the devices together.

        Returns:
          for each image the instances of each of its prompts.

        Raises:
          ImageError: when one of the images cannot be read.
          PromptError: on an empty or impossible prompt.
        """
        _check(threshold, options)
        return predict_batch(self.engine, images, prompts, threshold, options, batch_size)

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
        image = self._with_tracker()
        frame = self.config.image_size
        prompt = click_prompt(
            points,
            labels,
            box,
            mask_input,
            size=image.size,
            frame=frame,
            mask_side=self.engine.mask_side,
        )
        results = self.engine.run.click(self.engine.params, image.tracker, prompt)
        logits, iou = (array[0] for array in jax.device_get(results[bool(multimask)]))
        return postprocess.click_result(logits, iou, image.size)

    def predict_point_batch(
        self, points: Values, *, multimask: bool = True
    ) -> tuple[Float[np.ndarray, "n m s s"], Float[np.ndarray, "n m"]]:
        """Many points, each an object of its own: three hypotheses for every one.

        Args:
          points: (n, 2) pixels (x, y) of the original image.
          multimask: three hypotheses each, or one.

        Returns:
          low-resolution mask logits, and the model's own estimate of each mask's quality.

        Raises:
          PromptError, RuntimeError: as :meth:`predict_points`.
        """
        image = self._with_tracker()
        prompt = point_prompts(
            points,
            size=image.size,
            frame=self.config.image_size,
            mask_side=self.engine.mask_side,
        )
        count = len(np.atleast_2d(points))
        results = self.engine.run.click(self.engine.params, image.tracker, prompt)
        masks, iou = results[bool(multimask)]
        return np.asarray(masks)[:count], np.asarray(iou)[:count]

    def _image(self) -> _Encoded:
        if self._encoded is None:
            raise RuntimeError("there is no image yet: call set_image first")
        return self._encoded

    def _with_detector(self) -> _Encoded:
        self.engine.require("decoder", part="image")
        image = self._image()
        if image.detector is None:
            image.detector = self.engine.run.detector_levels(self.engine.params, image.trunk)
        return image

    def _with_tracker(self) -> _Encoded:
        self.engine.require("tracker", part="tracker")
        image = self._image()
        if image.tracker is None:
            image.tracker = self.engine.run.tracker_levels(self.engine.params, image.trunk)
        return image

    def _ground(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, RawOutput]]:
        """Grounds prompts in groups; of each the number of prompts and the padded outputs."""
        image = self._with_detector()
        for prompt in prompts:
            phrase_of(prompt)  # complains before anything has run
        for start in range(0, len(prompts), PROMPT_BUCKETS[-1]):
            group = prompts[start : start + PROMPT_BUCKETS[-1]]
            yield len(group), self.engine.ground_one(image.detector, group, image.size)


def _asked(text: Any, boxes: Values, box_labels: Values | None) -> tuple[bool, list[Prompt]]:
    """Whether one result was asked for, and the prompts."""
    one = text is None or isinstance(text, str | TextFeatures)
    return one, [Prompt(t, boxes, box_labels) for t in ([text] if one else text)]


def _check(threshold: float, options: Options) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be between 0 and 1, got {threshold}")
    options.check()
