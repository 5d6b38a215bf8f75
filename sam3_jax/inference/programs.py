"""The model's entry points as compiled programs.

One program for an entry point and a set of padded sizes; outputs are float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int, UInt8

from sam3_jax.models.detector import Sam3
from sam3_jax.models.sam_heads import select_masks
from sam3_jax.types import ClickPrompt, Geometry, Levels, TextFeatures

DTYPES = ("auto", "bfloat16", "float32")


# Images: normalised, or bytes, which are a quarter to move and are normalised on the devices.
AnyArray = Array | np.ndarray
Pixels = Float[AnyArray, "b s s 3"] | UInt8[AnyArray, "b s s 3"]


class RawOutput(NamedTuple):
    """The model's outputs for one prompt before any threshold, float32.

    ``pred_logits`` do not contain presence, ``presence_logits`` are not clamped; boxes are
    (cx, cy, w, h) fractions of the image; masks are logits at a quarter of the patch size.
    """

    pred_logits: Float[np.ndarray, " q"]
    pred_boxes: Float[np.ndarray, "q 4"]
    presence_logits: np.float32
    pred_masks: Float[np.ndarray, "q h w"]
    semantic_seg: Float[np.ndarray, "h w"]


class Programs(NamedTuple):
    """The model's entry points, jitted; parameters come first."""

    trunk: Callable[[Any, Pixels], Array]  # bytes are normalised first
    detector_levels: Callable[[Any, Array], Levels]
    tracker_levels: Callable[[Any, Array], Levels]
    text: Callable[[Any, Int[Array, "1 n"]], TextFeatures]
    ground_one: Callable[[Any, Levels, Sequence[TextFeatures], Geometry], RawOutput]
    ground_each: Callable[[Any, Levels, Sequence[TextFeatures], Geometry], RawOutput]
    exemplars: Callable[[Any, Levels, Geometry], TextFeatures]
    click: Callable[[Any, Levels, ClickPrompt], dict[bool, tuple[Array, Array]]]


def compute_dtype(name: Any) -> jnp.dtype:
    """The dtype that "auto", "bfloat16", "float32" or a dtype object stands for.

    "auto" is bfloat16 on accelerators and float32 on CPUs.

    Raises:
      ValueError: on any other.
    """
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    try:
        dtype = jnp.dtype(name)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return dtype


def compiler_options() -> dict[str, str] | None:
    """XLA's options for the platform in use.

    On CPUs its scheduler keeps what could run at the same time in memory at the same time: three
    times the temporaries of the vision trunk, and not a second gained (measured on two cores).
    """
    if jax.default_backend() != "cpu":
        return None
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def compile_programs(model: Sam3, mesh: Mesh | None) -> Programs:
    """Jits the entry points of ``model``, to run on ``mesh``, with float32 outputs."""

    def apply(params: Any, *args: Any, method: str) -> Any:
        return model.apply({"params": params}, *args, method=method)

    def trunk(params: Any, pixels: Pixels) -> Array:
        if pixels.dtype == jnp.uint8:
            pixels = normalize(pixels)
        return apply(params, pixels, method="encode_trunk")

    def detector_levels(params: Any, features: Array) -> Levels:
        return apply(params, features, method="detector_levels")

    def tracker_levels(params: Any, features: Array) -> Levels:
        return apply(params, features, method="tracker_levels")

    def text(params: Any, token_ids: Int[Array, "1 n"]) -> TextFeatures:
        return apply(params, token_ids, method="encode_text")

    def ground(
        params: Any,
        levels: Levels,
        texts: Sequence[TextFeatures],
        geometry: Geometry,
        image_index: Array | None,
    ) -> RawOutput:
        features = TextFeatures(*(jnp.concatenate(parts) for parts in zip(*texts, strict=True)))
        out = apply(params, levels, features, geometry, image_index, None, method="ground")
        return RawOutput(*(getattr(out, f).astype(jnp.float32) for f in RawOutput._fields))

    def ground_one(params: Any, levels: Levels, texts: Any, geometry: Geometry) -> RawOutput:
        return ground(params, levels, texts, geometry, jnp.zeros(len(texts), jnp.int32))

    def ground_each(params: Any, levels: Levels, texts: Any, geometry: Geometry) -> RawOutput:
        return ground(params, levels, texts, geometry, None)

    def exemplars(params: Any, levels: Levels, geometry: Geometry) -> TextFeatures:
        tokens, mask = apply(params, geometry, levels[-1], method="encode_geometry")
        return TextFeatures(tokens, mask)

    def click(params: Any, levels: Levels, prompt: ClickPrompt) -> dict[bool, tuple]:
        image_index = jnp.zeros(len(prompt.points), jnp.int32)
        out = apply(params, levels, prompt, image_index, method="click")
        results = {}
        for multimask in (True, False):
            masks, iou = select_masks(out, model.config.sam, multimask=multimask)
            results[multimask] = masks.astype(jnp.float32), iou.astype(jnp.float32)
        return results

    def compiled(function: Callable) -> Callable:
        jitted = jax.jit(function, compiler_options=compiler_options())

        def run(*args: Any) -> Any:
            with jax.set_mesh(mesh):
                return jitted(*args)

        return jitted if mesh is None else run

    images = (trunk, detector_levels, tracker_levels)
    return Programs(*map(compiled, (*images, text, ground_one, ground_each, exemplars, click)))


@jax.jit
def take_masks(
    masks: Float[Array, "p q h w"], prompt: Int[Array, ""], queries: Int[Array, " n"]
) -> Float[Array, "n h w"]:
    """Some masks of one prompt."""
    return masks[prompt, queries]


@functools.partial(jax.jit, static_argnames="count")
def likely_masks(
    logits: Float[Array, "p q"], masks: Float[Array, "p q h w"], *, count: int
) -> tuple[Int[Array, "p n"], Float[Array, "p n h w"]]:
    """The ``count`` queries of every prompt with the highest logits, and their masks."""
    _, queries = jax.lax.top_k(logits, min(count, logits.shape[1]))
    return queries, jnp.take_along_axis(masks, queries[:, :, None, None], axis=1)


def normalize(pixels: UInt8[AnyArray, "*s"]) -> Float32[Array, "*s"]:
    """0..255 to -1..1, as :func:`sam3_jax.data.images.normalize` does it with a table.

    A compiler that multiplies and subtracts in one go rounds once less: 6e-8 off.
    """
    return (pixels.astype(jnp.float32) * np.float32(1 / 255) - 0.5) / 0.5
