"""The model on its devices: parameters, compiled programs, phrases that were encoded before.

What the predictor of single images and jobs over many images share. Prompts are grounded either
several on one image (:meth:`Engine.ground_one`) or one on each image of a batch
(:meth:`Engine.ground_each`), where a batch spread over a mesh stays where it is.
"""

from __future__ import annotations

import collections
import functools
import os
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from sam3_jax import checkpoint
from sam3_jax.config import ModelConfig
from sam3_jax.inference import compile_cache
from sam3_jax.inference.instances import KEPT_BUCKETS, Kept, keep_instances
from sam3_jax.inference.options import DEFAULTS, Options
from sam3_jax.inference.programs import (
    Pixels,
    RawOutput,
    compile_programs,
    compute_dtype,
    likely_masks,
)
from sam3_jax.inference.prompts import Prompt, Size, bucket, pad_geometry, phrase_of
from sam3_jax.inference.text_features import joined, same_length
from sam3_jax.inference.variants import at_resolution, with_mask_prompts
from sam3_jax.models.detector import Sam3
from sam3_jax.sharding import batch_sharding, on_one_device, param_shardings
from sam3_jax.tokenizer import default_tokenizer
from sam3_jax.types import Levels, TextFeatures

PROMPT_BUCKETS = (1, 2, 4)  # more prompts are grounded in groups: each needs 0.5 GB for its maps
PHRASES_KEPT = 256  # features of the latest phrases, 32 KB each

_FILLER = Prompt("visual")  # for images of a batch that have fewer prompts than others


class Round(NamedTuple):
    """One prompt of each image of a batch, as the devices have it or will have it."""

    out: RawOutput
    queries: Int[Array, "b n"]  # those with the best chances to be kept
    masks: Float[Array, "b n h w"]  # theirs


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
        self.config = at_resolution(config, resolution)
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
          RuntimeError: when it lacks the parameters of ``module``, such as "tracker" or
            "tracker/memory_encoder".
        """
        held = self.params
        for name in module.split("/"):
            held = held.get(name, {})
        if not held:
            raise RuntimeError(
                f"the checkpoint has no weights for this ({module}): it needs one that was "
                f"converted with --part all or --part {part}"
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
            found = keep_instances(out, here, options, likely=likely, semantic=semantic)
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
        return joined(text, TextFeatures(shown.tokens[:, :count], shown.mask[:, :count]))

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
        texts = same_length([self._text(prompt) for prompt in prompts])
        geometry = pad_geometry(prompts, sizes, self.mask_side)
        if geometry.masks.shape[1] and not self.config.geometry.mask_prompts:
            self.params, self.config = with_mask_prompts(self.params, self.config)
            self.run = compile_programs(Sam3(self.config, self.dtype), self.mesh)
        ground = self.run.ground_one if shared else self.run.ground_each
        return ground(self.params, levels, texts, geometry)

    def _text(self, prompt: Prompt) -> TextFeatures:
        phrase = phrase_of(prompt)
        return self.encode_text(phrase) if isinstance(phrase, str) else phrase

    def boxes_from_masks(self, options: Options) -> bool:
        """Whether boxes are drawn around the masks."""
        away = self.config.image_size != self.trained_size
        return options.boxes == "masks" or (options.boxes == "auto" and away)
