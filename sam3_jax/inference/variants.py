"""The released model otherwise than it was trained: other resolutions, parts without weights."""

from __future__ import annotations

import dataclasses
import warnings

import jax

from sam3_jax.config import ModelConfig
from sam3_jax.models.detector import untrained_mask_params


class UntrainedWarning(UserWarning):
    """Something works, but no released weights were trained for it."""


def at_resolution(config: ModelConfig, resolution: int | None) -> ModelConfig:
    """The configuration with another side of the input frame; the weights do not depend on it.

    Raises:
      ValueError: on an impossible one.
    """
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


def with_mask_prompts(params: dict, config: ModelConfig) -> tuple[dict, ModelConfig]:
    """Adds what reads exemplar masks, with fresh parameters unless the checkpoint has some."""
    geometry = dataclasses.replace(config.geometry, mask_prompts=True)
    config = dataclasses.replace(config, geometry=geometry)
    if "mask_encoder" not in params["geometry"]:
        warnings.warn(
            "exemplar masks are read with untrained weights: the released model has none for "
            "them, so expect nothing of the results before you have trained some",
            UntrainedWarning,
            stacklevel=3,  # whoever grounds the prompt
        )
        fresh = untrained_mask_params(config, jax.random.key(0))
        params = {**params, "geometry": {**params["geometry"], **fresh}}
    return params, config
