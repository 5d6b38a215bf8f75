"""The model on its devices: parameters, compiled programs, phrases that were encoded before.

What the predictor of single images and jobs over many images share. Prompts are grounded either
several on one image (:meth:`Engine.ground_one`) or one on each image of a batch
(:meth:`Engine.ground_each`), where a batch spread over a mesh stays where it is.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import threading
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from sam3_jax import checkpoint
from sam3_jax.config import ModelConfig
from sam3_jax.inference import compile_cache, postprocess
from sam3_jax.inference.nms import nms
from sam3_jax.inference.options import DEFAULTS, Options
from sam3_jax.inference.programs import (
    Pixels,
    RawOutput,
    compile_programs,
    compute_dtype,
    likely_masks,
    take_masks,
)
from sam3_jax.inference.prompts import Prompt, Size, bucket, pad_geometry, phrase_of
from sam3_jax.models.detector import Sam3, untrained_mask_params
from sam3_jax.sharding import batch_sharding, on_one_device, param_shardings
from sam3_jax.tokenizer import default_tokenizer
from sam3_jax.types import Levels, TextFeatures

PROMPT_BUCKETS = (1, 2, 4)  # more prompts are grounded in groups: each needs 0.5 GB for its maps
KEPT_BUCKETS = (1, 4, 16, 64, 256)  # masks that leave the device together
PHRASES_KEPT = 256  # features of the latest phrases, 32 KB each


_FILLER = Prompt("visual")  # for images of a batch that have fewer prompts than others


class Kept(NamedTuple):
    """Instances of one prompt as the model gives them, best score first."""

    scores: Float[np.ndarray, " n"]
    boxes: Float[np.ndarray, "n 4"]  # (cx, cy, w, h) fractions of the image
    logits: Float[np.ndarray, "n h w"]  # of the masks, at a quarter of the patch size
    semantic: Float[np.ndarray, "h w"] | None = None  # logits of the concept, where asked for


class Round(NamedTuple):
    """One prompt of each image of a batch, as the devices have it or will have it."""

    out: RawOutput
    queries: Int[Array, "b n"]  # those with the best chances to be kept
    masks: Float[Array, "b n h w"]  # theirs


class UntrainedWarning(UserWarning):
    """Something works, but no released weights were trained for it."""


class Engine:
    """Parameters on devices and the programs that use them."""

    def __init__(
        self,
        params: dict,
        config: ModelConfig,
        *,
        dtype: Any = "auto",
        mesh: Mesh | None = None,
        resolution: int | None = None,
    ):
        """See :class:`sam3_jax.ImagePredictor`."""
        self.trained_size = config.image_size
        self.config = _at_resolution(config, resolution)
        self.dtype = compute_dtype(dtype)
        self.mesh = mesh
        self.params = jax.device_put(params, param_shardings(params, mesh) if mesh else None)
        self.run = compile_programs(Sam3(self.config, self.dtype), mesh)
        self._tokenize = default_tokenizer()
        self._phrases: collections.OrderedDict[str, TextFeatures] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._likely = KEPT_BUCKETS[2]  # instances that the next prompts are expected to have

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        dtype: Any = "auto",
        mesh: Mesh | None = None,
        resolution: int | None = None,
    ) -> Engine:
        """See :meth:`sam3_jax.ImagePredictor.from_pretrained`."""
        compute = compute_dtype(dtype)
        compile_cache.enable()
        loaded = checkpoint.load(
            path,
            # The backbones' matrices in the dtype that they are multiplied in: half the memory.
            dtype=None if compute == jnp.float32 else compute,
            # Straight onto the devices: through NumPy there would be two copies of everything.
            shardings=functools.partial(param_shardings, mesh=mesh) if mesh else on_one_device,
        )
        return cls(loaded.params, loaded.config, dtype=dtype, mesh=mesh, resolution=resolution)

    def replace_params(self, params: dict) -> None:
        """Goes on with other parameters, and forgets phrases that the old ones encoded.

        The programs stay, and compile anew only for another structure, dtype or device. Images that
        predictors have set belong to the old parameters: set them again.
        """
        params = jax.device_put(params, param_shardings(params, self.mesh) if self.mesh else None)
        with self._lock:
            self.params = params
            self._phrases.clear()

    def require(self, module: str, *, part: str) -> None:
        """A checkpoint may hold a part of the model only.

        Raises:
          RuntimeError: when it lacks the parameters of ``module``.
        """
        if module not in self.params:
            raise RuntimeError(
                f"the checkpoint has no weights for this ({module}): convert the source again "
                f"with --part all or --part {part}"
            )

    def place(self, pixels: Pixels) -> Array:
        """Moves preprocessed images to the devices, spread over the mesh if it divides them."""
        if self.mesh is None or len(pixels) % self.mesh.shape.get("data", 1):
            return jax.device_put(pixels)
        return jax.device_put(pixels, batch_sharding(self.mesh))

    def trunk(self, pixels: Pixels) -> Array:
        """The ViT's map of images in the model's size, as bytes or normalised."""
        return self.run.trunk(self.params, self.place(pixels))

    def encode_text(self, phrase: str) -> TextFeatures:
        """Features of one phrase, encoded once."""
        with self._lock:
            if phrase not in self._phrases:
                token_ids = self._tokenize([phrase], self.config.text.context_length)
                self._phrases[phrase] = self.run.text(self.params, token_ids)
                if len(self._phrases) > PHRASES_KEPT:
                    self._phrases.popitem(last=False)
            self._phrases.move_to_end(phrase)
            return self._phrases[phrase]

    def ground_one(self, levels: Levels, prompts: Sequence[Prompt], size: Size) -> RawOutput:
        """Several prompts on the one image of ``levels``; the result is padded to a bucket."""
        length = bucket(len(prompts), PROMPT_BUCKETS)
        padded = [*prompts, *prompts[:1] * (length - len(prompts))]
        return self._ground(levels, padded, [size] * length, shared=True)

    def ground_each(
        self, levels: Levels, prompts: Sequence[Prompt], sizes: Sequence[Size]
    ) -> RawOutput:
        """Prompt i on image i of a batch."""
        return self._ground(levels, prompts, sizes, shared=False)

    def submit(
        self,
        pixels: Pixels,
        prompts: Sequence[Sequence[Prompt]],
        sizes: Sequence[Size],
        batch_size: int,
    ) -> list[Round]:
        """Starts a batch: the images, then one round for the first prompt of each, and so on.

        Args:
          pixels: images in the model's size, as bytes or normalised, at most ``batch_size``; the
            rest is padding.
          prompts: of each image.
          sizes: of the original images.

        Returns:
          the rounds' outputs, which the devices may still be working on.
        """
        self.require("decoder", part="image")
        for own in prompts:
            for prompt in own:
                phrase_of(prompt)  # complains before anything has run
        missing = batch_size - len(pixels)
        if missing:
            pixels = np.concatenate([pixels, np.repeat(pixels[:1], missing, axis=0)])
        sizes = [*sizes, *sizes[:1] * missing]
        levels = self.run.detector_levels(self.params, self.trunk(pixels))
        rounds = []
        for turn in range(max(map(len, prompts), default=0)):
            asked = [own[turn] if turn < len(own) else _FILLER for own in prompts]
            out = self.ground_each(levels, [*asked, *[_FILLER] * missing], sizes)
            # Asked for later, masks would come behind the batches that are queued by then.
            likely = likely_masks(out.pred_logits, out.pred_masks, count=self._likely)
            for array in (out.pred_logits, out.presence_logits, out.pred_boxes, *likely):
                array.copy_to_host_async()
            rounds.append(Round(out, *likely))
        return rounds

    def collect(
        self,
        rounds: Sequence[Round],
        thresholds: Sequence[Sequence[float]],
        options: Options = DEFAULTS,
        *,
        semantic: bool = False,
    ) -> list[list[Kept]]:
        """Waits for a batch: for each image the instances of each of its prompts.

        ``thresholds``: one for each prompt of each image.
        """
        kept: list[list[Kept]] = [[] for _ in thresholds]
        most = 0
        for turn, (out, *likely) in enumerate(rounds):
            here = [own[turn] if turn < len(own) else 2.0 for own in thresholds]  # 2: nothing
            found = self.keep(out, here, options, likely=likely, semantic=semantic)
            most = max([most, *(len(one.scores) for one in found)])
            for own, new, given in zip(kept, found, here, strict=True):
                if given <= 1:
                    own.append(new)
        self._likely = bucket(most, KEPT_BUCKETS)
        return kept

    def encode_exemplars(self, levels: Levels, prompt: Prompt, size: Size) -> TextFeatures:
        """Tokens of a prompt's phrase and, behind them, of its boxes on an image."""
        text = self._text(prompt)
        geometry = pad_geometry([prompt], [size])
        count = geometry.boxes.shape[1]
        # Behind the boxes comes the class token, which every image has of its own.
        shown = self.run.exemplars(self.params, levels, geometry)
        tokens = jnp.concatenate([text.tokens, shown.tokens[:, :count]], axis=1)
        return TextFeatures(tokens, jnp.concatenate([text.mask, shown.mask[:, :count]], axis=1))

    @property
    def default_batch_size(self) -> int:
        """Images that keep the devices busy: 8 for each accelerator, 1 for each CPU device."""
        devices = 1 if self.mesh is None else self.mesh.shape["data"]
        return devices * (1 if jax.default_backend() == "cpu" else 8)

    @property
    def mask_side(self) -> int:
        """Side of the low-resolution masks."""
        return 4 * (self.config.image_size // self.config.vision.patch_size)

    def _ground(
        self, levels: Levels, prompts: Sequence[Prompt], sizes: Sequence[Size], *, shared: bool
    ) -> RawOutput:
        texts = _same_length([self._text(prompt) for prompt in prompts])
        geometry = pad_geometry(prompts, sizes, self.mask_side)
        if geometry.masks.shape[1]:
            self._allow_mask_exemplars()
        ground = self.run.ground_one if shared else self.run.ground_each
        return ground(self.params, levels, texts, geometry)

    def _allow_mask_exemplars(self) -> None:
        """Adds what reads masks, with fresh parameters unless the checkpoint has some."""
        if self.config.geometry.mask_prompts:
            return
        geometry = dataclasses.replace(self.config.geometry, mask_prompts=True)
        config = dataclasses.replace(self.config, geometry=geometry)
        if "mask_encoder" not in self.params["geometry"]:
            warnings.warn(
                "exemplar masks are read with untrained weights: the released model has none for "
                "them, so expect nothing of the results before you have trained some",
                UntrainedWarning,
                stacklevel=2,
            )
            fresh = untrained_mask_params(config, jax.random.key(0))
            self.params = {**self.params, "geometry": {**self.params["geometry"], **fresh}}
        self.config = config
        self.run = compile_programs(Sam3(config, self.dtype), self.mesh)

    def _text(self, prompt: Prompt) -> TextFeatures:
        phrase = phrase_of(prompt)
        return self.encode_text(phrase) if isinstance(phrase, str) else phrase

    def keep(
        self,
        out: RawOutput,
        thresholds: Sequence[float],
        options: Options = DEFAULTS,
        *,
        likely: Sequence[Array] | None = None,
        semantic: bool = False,
    ) -> list[Kept]:
        """The instances of the first ``len(thresholds)`` prompts, read back from the devices.

        ``likely``: queries whose masks were asked for before it was known which will be kept, and
        these masks.
        """
        logits, presence, boxes = jax.device_get(
            (out.pred_logits, out.presence_logits, out.pred_boxes)
        )
        scores = postprocess.instance_scores(logits, presence if options.presence else None)
        maps = np.asarray(out.semantic_seg) if semantic else None
        there = None if likely is None else jax.device_get(likely)
        kept = []
        for i, threshold in enumerate(thresholds):
            chosen = postprocess.select(scores[i], threshold)
            masks = there and _among(chosen, there[0][i], there[1][i])
            if masks is None:
                queries = np.zeros(bucket(len(chosen), KEPT_BUCKETS), np.int32)
                queries[: len(chosen)] = chosen
                masks = np.asarray(take_masks(out.pred_masks, np.int32(i), queries))[: len(chosen)]
            instances = _thin_out(Kept(scores[i][chosen], boxes[i][chosen], masks), options)
            if semantic:
                instances = instances._replace(semantic=maps[i])
            kept.append(instances)
        return kept

    def boxes_from_masks(self, options: Options) -> bool:
        """Whether boxes are drawn around the masks."""
        away = self.config.image_size != self.trained_size
        return options.boxes == "masks" or (options.boxes == "auto" and away)


def _among(
    chosen: Int[np.ndarray, " n"],
    queries: Int[np.ndarray, " m"],
    masks: Float[np.ndarray, "m h w"],
) -> Float[np.ndarray, "n h w"] | None:
    """The masks of the chosen queries, None where they are not all among ``queries``."""
    order = np.argsort(queries)
    places = order[np.searchsorted(queries, chosen, sorter=order).clip(max=len(order) - 1)]
    return masks[places] if (queries[places] == chosen).all() else None


def _at_resolution(config: ModelConfig, resolution: int | None) -> ModelConfig:
    """The configuration with another side of the input frame; the weights do not depend on it."""
    patch = config.vision.patch_size
    if resolution is None or resolution == config.image_size:
        return config
    if resolution < 4 * patch or resolution % patch:
        good = patch * config.vision.window_size
        raise ValueError(
            f"resolution must be a multiple of {patch} from {4 * patch} on (best of {good}: whole "
            f"attention windows), got {resolution}"
        )
    return dataclasses.replace(config, image_size=resolution)


def _same_length(texts: Sequence[TextFeatures]) -> list[TextFeatures]:
    """Pads prompts of different lengths (those with exemplars of other images are longer)."""
    longest = max(text.mask.shape[1] for text in texts)

    def padded(text: TextFeatures) -> TextFeatures:
        more = longest - text.mask.shape[1]
        if not more:
            return text
        return TextFeatures(
            jnp.pad(text.tokens, ((0, 0), (0, more), (0, 0))),
            jnp.pad(text.mask, ((0, 0), (0, more))),
        )

    return [padded(text) for text in texts]


def _thin_out(kept: Kept, options: Options) -> Kept:
    """Without duplicates, and no more than were asked for."""
    if options.nms != "none" and len(kept.scores) > 1:
        rest = nms(
            kept.logits > 0, kept.scores, measure=options.nms, threshold=options.nms_threshold
        )
        kept = Kept(*(field[rest] for field in kept[:3]))
    if options.max_instances:
        kept = Kept(*(field[: options.max_instances] for field in kept[:3]))
    return kept
