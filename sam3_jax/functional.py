"""The model as four stateless functions, for your own programs, transformations and meshes.

Thin names around ``Sam3.apply``: parameters go in first, arrays come out, nothing is kept. All can
be jitted and differentiated; the configuration is bound beforehand::

    encode = jax.jit(functools.partial(functional.encode_images, config=config))
    features = encode(params, pixels)
    text = jax.jit(functools.partial(functional.encode_texts, config=config))(params, token_ids)
    found = functional.ground(params, features.detector, text, config=config)

Phrases become ids by ``sam3_jax.tokenizer``, pictures become pixels by ``sam3_jax.data.images``,
outputs become instances by ``sam3_jax.inference.postprocess``.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sam3_jax.config import ModelConfig
from sam3_jax.models.detector import Sam3, empty_geometry
from sam3_jax.types import (
    ClickOutput,
    ClickPrompt,
    Geometry,
    GroundOutput,
    ImageFeatures,
    Levels,
    TextFeatures,
)

Params = dict[str, Any]


def encode_images(
    params: Params,
    pixels: Float[Array, "b h w 3"],
    *,
    config: ModelConfig,
    dtype: DTypeLike = jnp.float32,
    detector: bool = True,
    tracker: bool = False,
) -> ImageFeatures:
    """Features of images in [-1, 1], sides multiples of the patch.

    Args:
      dtype: of computation.
      detector: make the pyramid that :func:`ground` reads.
      tracker: make the pyramid that :func:`click` reads.
    """
    model = Sam3(config, dtype)
    which = {"detector": detector, "tracker": tracker}
    return model.apply({"params": params}, pixels, method="encode_image", **which)


def encode_texts(
    params: Params,
    token_ids: Int[Array, "t n"],
    *,
    config: ModelConfig,
    dtype: DTypeLike = jnp.float32,
) -> TextFeatures:
    """Features of phrases, which do not depend on images."""
    return Sam3(config, dtype).apply({"params": params}, token_ids, method="encode_text")


def ground(
    params: Params,
    levels: Levels,
    text: TextFeatures,
    geometry: Geometry | None = None,
    *,
    config: ModelConfig,
    image_index: Int[Array, " p"] | None = None,
    text_index: Int[Array, " p"] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> GroundOutput:
    """Finds every instance of P concepts in the images of ``levels``.

    Args:
      geometry: boxes, points and masks of the prompts; None: of none.
      image_index, text_index: image and phrase of each prompt; None: prompt i is about image i and
        phrase i.
    """
    if geometry is None:
        first = image_index if image_index is not None else text_index
        geometry = empty_geometry(len(text.tokens) if first is None else len(first))
    args = (levels, text, geometry, image_index, text_index)
    return Sam3(config, dtype).apply({"params": params}, *args, method="ground")


def click(
    params: Params,
    levels: Levels,
    prompt: ClickPrompt,
    image_index: Int[Array, " p"],
    *,
    config: ModelConfig,
    dtype: DTypeLike = jnp.float32,
) -> ClickOutput:
    """Segments what P point, box or mask prompts mean, on the tracker's pyramids.

    ``sam3_jax.models.sam_heads.select_masks`` chooses among the hypotheses.
    """
    args = (levels, prompt, image_index)
    return Sam3(config, dtype).apply({"params": params}, *args, method="click")
