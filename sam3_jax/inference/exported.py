"""Runs a model that ``export.py`` wrote as StableHLO. Needs jax (and flatbuffers), nothing else.

Neither Flax nor the model's code is imported: a folder of an export is the model.

>>> model = load_exported("sam3_export")
>>> image = model.encode_image(pixels)              # (b, s, s, 3), RGB scaled to -1..1
>>> text = model.encode_text(token_ids)             # (t, 32)
>>> found = model.ground(image, text, image_index=[0])
>>> found.logits, found.boxes, found.masks
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import export as jax_export

from sam3_jax.inference.exported_files import (
    DESCRIPTION,
    ExportError,
    check_array,
    check_platform,
    fitting_params,
    read_description,
    read_params,
    read_program,
)

__all__ = [
    "ExportError",
    "ExportedClick",
    "ExportedImage",
    "ExportedInstances",
    "ExportedModel",
    "ExportedText",
    "load_exported",
]

PADDING = -2  # label of a point slot that is not used


class ExportedImage(NamedTuple):
    """Pyramids of B images, finest level first; empty where the export lacks that half."""

    detector: tuple[jax.Array, ...]  # each (b, h, w, dim), for ``ground``
    tracker: tuple[jax.Array, ...]  # for ``click``


class ExportedText(NamedTuple):
    """Encoded phrases."""

    tokens: jax.Array  # (t, n, dim)
    mask: jax.Array  # (t, n), True = valid


class ExportedInstances(NamedTuple):
    """Everything found for P prompts before any threshold, float32.

    An instance's score is ``sigmoid(logits) * sigmoid(presence)[:, None]``.
    """

    logits: jax.Array  # (p, q)
    boxes: jax.Array  # (p, q, 4), (cx, cy, w, h) as fractions of the image
    presence: jax.Array  # (p,)
    masks: jax.Array  # (p, q, h, w) logits
    semantic: jax.Array  # (p, h, w) logits


class ExportedClick(NamedTuple):
    """What P clicks mean, float32: three hypotheses for one point, the single one otherwise."""

    masks: jax.Array  # (p, 3, h, w) logits
    iou: jax.Array  # (p, 3), the model's own estimates
    single_mask: jax.Array  # (p, 1, h, w)
    single_iou: jax.Array  # (p, 1)
    object_logits: jax.Array  # (p,)


class ExportedModel:
    """The programs of one export and their parameters; made by :func:`load_exported`.

    Every method raises ExportError, naming the argument, for shapes and dtypes that the export was
    not made for.
    """

    def __init__(
        self,
        folder: Path,
        description: Mapping[str, Any],
        programs: Mapping[str, jax_export.Exported],
        params: Mapping[str, Any],
    ):
        self.folder = folder
        self.description = description
        self.programs = programs
        self.params = params
        self._compiled = {name: jax.jit(program.call) for name, program in programs.items()}

    def encode_image(self, pixels: Any) -> ExportedImage:
        """RGB images of the export's size, (b, s, s, 3), scaled to -1..1."""
        out = self.call("encode_image", [pixels])
        names = [value["name"] for value in self._spec("encode_image")["outputs"]]
        named = list(zip(names, out, strict=True))

        def levels(half: str) -> tuple[jax.Array, ...]:
            return tuple(level for name, level in named if name.startswith(half))

        return ExportedImage(levels("detector"), levels("tracker"))

    def encode_text(self, token_ids: Any) -> ExportedText:
        """Token ids, (t, context length), zero padded."""
        return ExportedText(*self.call("encode_text", [token_ids]))

    def ground(
        self,
        image: ExportedImage,
        text: ExportedText,
        boxes: Any = None,
        box_labels: Any = None,
        image_index: Any = None,
    ) -> ExportedInstances:
        """Finds every instance of P concepts; prompt i is phrase i of ``text``.

        Args:
          image: B encoded images.
          text: P encoded phrases ("visual" for boxes alone).
          boxes: (p, k, 4) exemplars, (cx, cy, w, h) as fractions of the image; None: none.
          box_labels: (p, k), 1 for "like this" (the default for all), 0 for "not like this", -2
            for a slot that is not used.
          image_index: (p,) image of each prompt. None: prompt i is about image i, or all about the
            only one.
        """
        prompts = len(text.tokens)
        boxes = np.zeros((prompts, 0, 4)) if boxes is None else np.asarray(boxes)
        if box_labels is None:
            box_labels = np.ones(boxes.shape[:2], np.int32)
        boxes, labels = self._slots("ground", "boxes", boxes, box_labels)
        used = labels != PADDING
        index = self._index("ground", image_index, prompts, image.detector)
        inputs = [*image.detector, *text, boxes, np.where(used, labels, 0), used, index]
        return ExportedInstances(*self.call("ground", inputs))

    def click(
        self,
        image: ExportedImage,
        points: Any,
        labels: Any = None,
        mask_input: Any = None,
        image_index: Any = None,
    ) -> ExportedClick:
        """Segments the objects of P point prompts.

        Args:
          image: B encoded images.
          points: (p, n, 2) pixels (x, y) of the model's input frame.
          labels: (p, n), 1 positive (the default for all), 0 negative, 2 and 3 the corners of a
            box, -2 for a slot that is not used.
          mask_input: (p, h, w) logits of an earlier click's mask; None: none.
          image_index: see :meth:`ground`.
        """
        points = np.asarray(points)
        prompts = len(points)
        if labels is None:
            labels = np.ones(points.shape[:2], np.int32)
        points, labels = self._slots("click", "points", points, labels)
        given = mask_input is not None
        if not given:
            side = self._shape("click", "mask_input")[1:]
            mask_input = np.zeros((prompts, *side), np.float32)
        index = self._index("click", image_index, prompts, image.tracker)
        shown = np.full(prompts, given)
        inputs = [*image.tracker, points, labels, mask_input, shown, index]
        return ExportedClick(*self.call("click", inputs))

    def call(self, name: str, inputs: Sequence[Any]) -> tuple[jax.Array, ...]:
        """One program on exactly the inputs that ``export.json`` lists for it."""
        spec = self._spec(name)
        if len(inputs) != len(spec["inputs"]):
            wanted = ", ".join(value["name"] for value in spec["inputs"])
            raise ExportError(f"{name}: {len(inputs)} inputs, it takes {wanted}")
        sizes: dict[str, int] = {}
        arrays = [
            check_array(name, value, array, sizes)
            for value, array in zip(spec["inputs"], inputs, strict=True)
        ]
        params = {key: self.params[key] for key in spec["parameters"]}
        return tuple(self._compiled[name](params, *arrays))

    def _spec(self, program: str) -> Mapping[str, Any]:
        if program not in self.programs:
            raise ExportError(
                f"{self.folder}: has no {program!r}, only {', '.join(self.programs)}; export a "
                "checkpoint that has that part of the model"
            )
        return self.description["programs"][program]

    def _shape(self, program: str, name: str) -> Sequence[int | str]:
        values = self._spec(program)["inputs"]
        return next(value["shape"] for value in values if value["name"] == name)

    def _slots(self, program: str, name: str, array: Any, labels: Any) -> tuple[Any, Any]:
        """Boxes or points and their labels, padded to the number that the export has room for."""
        slots = self._shape(program, name)[1]
        labels = np.asarray(labels)
        if array.ndim != 3 or labels.shape != array.shape[:2]:
            raise ExportError(
                f"{program}: {name} must be (prompts, number, {4 if name == 'boxes' else 2}) with "
                f"a label each, got shapes {array.shape} and {labels.shape}"
            )
        missing = slots - array.shape[1]
        if missing < 0:
            raise ExportError(
                f"{program}: {array.shape[1]} {name} a prompt, the export has room for {slots}; "
                f"export again with {name}={array.shape[1]}"
            )
        if missing > 0:
            array = np.pad(array, ((0, 0), (0, missing), (0, 0)))
            labels = np.pad(labels, ((0, 0), (0, missing)), constant_values=PADDING)
        return array.astype(np.float32), labels

    def _index(self, program: str, given: Any, prompts: int, levels: Sequence[Any]) -> np.ndarray:
        images = len(levels[0]) if levels else 0
        if given is None:
            if images not in (1, prompts):
                raise ExportError(
                    f"{program}: {prompts} prompts on {images} images: give image_index"
                )
            return np.arange(prompts) if images == prompts else np.zeros(prompts, np.int32)
        index = np.asarray(given)
        if index.size and not (index.min() >= 0 and index.max() < max(images, 1)):
            raise ExportError(
                f"{program}: image_index must lie in 0..{images - 1}, got {index.tolist()}"
            )
        return index


def load_exported(folder: str | os.PathLike, *, params: Any = None) -> ExportedModel:
    """Reads an export.

    Args:
      folder: what ``export_model`` or ``infer.py --export`` wrote.
      params: parameters to use instead of the folder's (nested or by path), on any device; needed
        where the export was written without.

    Raises:
      ExportError: when the folder is none, is damaged, is of another version, was not made for
        this process' platform, or the parameters do not fit.
    """
    folder = Path(folder)
    description = read_description(folder)
    try:
        check_platform(folder, description["platforms"])
        specs = {str(name): dict(spec) for name, spec in description["programs"].items()}
        programs = {
            name: read_program(folder / s["file"], s["sha256"]) for name, s in specs.items()
        }
        if params is None:
            params = read_params(folder, description["parameters"])
        used = fitting_params(folder, params, specs, programs)
    except (KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{folder / DESCRIPTION}: damaged ({error!r}); export again") from error
    return ExportedModel(folder, description, programs, jax.device_put(used))
