"""The model's entry points as functions of plain arrays: what ``export.py`` turns into StableHLO.

Parameters come first, in a flat dictionary by path; everything else is one array after the other,
so that a caller needs none of our containers. Results are float32, but for the pyramids and the
text, which keep the compute dtype.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export as jax_export
from jaxtyping import Array

from sam3_jax.checkpoint.tree import unflatten
from sam3_jax.inference.exported_files import ExportError
from sam3_jax.models.detector import Sam3
from sam3_jax.models.sam_heads import select_masks
from sam3_jax.ops import attention
from sam3_jax.types import ClickPrompt, Geometry, TextFeatures

# Parameters that a program reads, by the beginning of their path; a few more may match.
PARAMETERS = {
    "encode_image": ("vision/", "tracker/mask_decoder/level_conv_"),
    "encode_text": ("text/",),
    "ground": ("geometry/", "fusion/", "decoder/", "scoring/", "segmentation/"),
    "click": ("tracker/prompt_encoder/", "tracker/mask_decoder/", "tracker/no_memory_embed/"),
}
# Not among the calls that jax promises to keep for years.
_CUDNN = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaScaleBiasSoftmax")
_INDEX = "image of each prompt, 0..b-1"


class Value(NamedTuple):
    """An array that goes in or comes out. Sizes that are free have names."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    meaning: str = ""


class Entry(NamedTuple):
    """A function of the parameters and of arrays, and the names of what it returns."""

    function: Callable[..., tuple[Array, ...]]
    inputs: list[Value]
    outputs: list[str]


def _apply(model: Sam3, params: dict[str, Array], *args: Any, **options: Any) -> Any:
    return model.apply({"params": unflatten(params)}, *args, **options)


def encode_image(model: Sam3, halves: Sequence[str]) -> Entry:
    """Pixels to the pyramids of ``halves``, of "detector" and "tracker"."""
    wanted = {half: half in halves for half in ("detector", "tracker")}

    def function(params: dict[str, Array], pixels: Array) -> tuple[Array, ...]:
        features = _apply(model, params, pixels, method="encode_image", **wanted)
        return (*features.detector, *features.tracker)

    side = model.config.image_size
    meaning = "RGB resized to the square whatever its shape, value / 127.5 - 1"
    pixels = Value("pixels", ("b", side, side, 3), "float32", meaning)
    outputs = [f"{half}_{i}" for half, is_wanted in wanted.items() if is_wanted for i in range(3)]
    return Entry(function, [pixels], outputs)


def encode_text(model: Sam3) -> Entry:
    """Token ids to prompt tokens."""

    def function(params: dict[str, Array], token_ids: Array) -> tuple[Array, ...]:
        return tuple(_apply(model, params, token_ids, method="encode_text"))

    meaning = "CLIP byte pairs, start and end of text, padded with zeros"
    shape = ("t", model.config.text.context_length)
    return Entry(function, [Value("token_ids", shape, "int32", meaning)], ["tokens", "token_mask"])


def ground(model: Sam3, levels: Sequence[Value], boxes: int) -> Entry:
    """Pyramids, text and boxes to instances. ``levels``: as ``encode_image`` gives them."""

    def function(params: dict[str, Array], *inputs: Array) -> tuple[Array, ...]:
        *pyramid, tokens, token_mask, xywh, labels, mask, index = inputs
        nothing = labels[:, :0]  # the number of prompts may be symbolic
        geometry = Geometry(
            *(xywh[:, :0, :2], nothing, mask[:, :0]),
            *(xywh, labels, mask),
            *(xywh[:, :0, :, None], nothing, mask[:, :0]),
        )
        text = TextFeatures(tokens, token_mask)
        out = _apply(model, params, tuple(pyramid), text, geometry, index, None, method="ground")
        values = (
            *(out.pred_logits, out.pred_boxes, out.presence_logits),
            *(out.pred_masks, out.semantic_seg),
        )
        return tuple(value.astype(jnp.float32) for value in values)

    text_shape = ("p", model.config.text.context_length)
    tokens = (*text_shape, model.config.dim)
    labels = "1 like this, 0 not like this"
    inputs = [
        *levels,
        Value("tokens", tokens, jnp.dtype(model.dtype).name, "phrase of each prompt"),
        Value("token_mask", text_shape, "bool"),
        Value("boxes", ("p", boxes, 4), "float32", "(cx, cy, w, h), fractions of the image"),
        Value("box_labels", ("p", boxes), "int32", labels),
        Value("box_mask", ("p", boxes), "bool", "False: slot without a box"),
        Value("image_index", ("p",), "int32", _INDEX),
    ]
    return Entry(function, inputs, ["logits", "boxes", "presence", "masks", "semantic"])


def click(model: Sam3, levels: Sequence[Value], points: int) -> Entry:
    """Pyramids, points and masks to the masks of objects."""

    def function(params: dict[str, Array], *inputs: Array) -> tuple[Array, ...]:
        *pyramid, xy, labels, mask_input, has_mask, index = inputs
        prompt = ClickPrompt(xy, labels, mask_input, has_mask)
        out = _apply(model, params, tuple(pyramid), prompt, index, method="click")
        results = [
            value
            for multimask in (True, False)
            for value in select_masks(out, model.config.sam, multimask=multimask)
        ]
        return tuple(value.astype(jnp.float32) for value in (*results, out.object_logits))

    labels = "1 positive, 0 negative, 2 and 3 corners of a box, -2 slot without a point"
    inputs = [
        *levels,
        Value("points", ("p", points, 2), "float32", "(x, y) in pixels of the input frame"),
        Value("labels", ("p", points), "int32", labels),
        Value("mask_input", ("p", *levels[0].shape[1:3]), "float32", "logits of an earlier mask"),
        Value("has_mask", ("p",), "bool", "False: mask_input is not read"),
        Value("image_index", ("p",), "int32", _INDEX),
    ]
    return Entry(function, inputs, ["masks", "iou", "single_mask", "single_iou", "object_logits"])


def entries(model: Sam3, modules: set[str], boxes: int, points: int) -> Iterator[tuple[str, Entry]]:
    """The programs that parameters with these top modules allow."""
    parts = {"detector": "decoder", "tracker": "tracker"}
    halves = [half for half, module in parts.items() if {"vision", module} <= modules]
    if not halves:
        return
    yield "encode_image", encode_image(model, halves)
    side = model.config.image_size // model.config.vision.patch_size
    dim = model.config.dim

    def levels(half: str, dims: Sequence[int]) -> list[Value]:
        sides = (4 * side, 2 * side, side)
        shapes = [("b", s, s, d) for s, d in zip(sides, dims, strict=True)]
        dtype = jnp.dtype(model.dtype).name
        return [Value(f"{half}_{i}", shape, dtype) for i, shape in enumerate(shapes)]

    if "detector" in halves:
        yield "encode_text", encode_text(model)
        yield "ground", ground(model, levels("detector", (dim,) * 3), boxes)
    if "tracker" in halves:
        projected = levels("tracker", (dim // 8, dim // 4, dim))
        yield "click", click(model, projected, points)


def trace(
    name: str,
    entry: Entry,
    params: dict[str, Any],
    platforms: Sequence[str],
    batch: int | None,
    portable: bool,
) -> jax_export.Exported:
    """One program, for the given kinds of machines.

    Raises:
      ExportError: when jax cannot.
    """
    scope = jax_export.SymbolicScope()
    inputs = []
    for value in entry.inputs:
        sizes = ", ".join(str(batch or s) if isinstance(s, str) else str(s) for s in value.shape)
        shape = jax_export.symbolic_shape(f"({sizes},)", scope=scope)
        inputs.append(jax.ShapeDtypeStruct(shape, value.dtype))
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in params.items()}
    checks = [] if portable else [jax_export.DisabledSafetyCheck.custom_call(c) for c in _CUDNN]

    # A function of its own each time: jax.jit would find an earlier trace with other attention.
    def program(*args: Any) -> tuple:
        return entry.function(*args)

    program.__name__ = name
    export = jax_export.export(jax.jit(program), platforms=platforms, disabled_checks=checks)
    try:
        with _without_folders(), attention.portable() if portable else contextlib.nullcontext():
            return export(shapes, *inputs)
    except (NotImplementedError, ValueError, TypeError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        remedy = "leave portable_attention on" if not portable else "give a batch size (batch=1)"
        raise ExportError(f"{name}: cannot be exported ({reason}); {remedy}") from error


@contextlib.contextmanager
def _without_folders() -> Iterator[None]:
    """Programs name the source lines they come from: without the folders of this machine."""
    option = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, option)
    jax.config.update(option, r".*[/\\]")
    try:
        yield
    finally:
        jax.config.update(option, before)
