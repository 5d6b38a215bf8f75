"""Our parameters from a transformers model in memory."""

from __future__ import annotations

import numpy as np
import torch

from sam3_jax.checkpoint.tree import flatten, unflatten
from sam3_jax.config import ModelConfig
from sam3_jax.convert.convert import match
from sam3_jax.convert.layout import hf_layout
from sam3_jax.models.detector import init_shapes


def params_from_hf(model: torch.nn.Module, config: ModelConfig) -> dict:
    """Nested parameters (numpy, float32) that hold the weights of a transformers model.

    Args:
      model: one of the four SAM 3 classes, at the sizes of ``config``.
      config: the sizes.

    Returns:
      The tree without the parts that the class lacks. The point branch of the geometry encoder
      (``geometry/point_*``), which no class has, is zero.
    """
    layout = hf_layout(type(model).__name__, config)
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    shapes = {path: leaf.shape for path, leaf in flatten(init_shapes(config)).items()}
    matched = match(state, layout, shapes, layout.held_parts(state), layout.name)
    return unflatten({path: np.ascontiguousarray(v) for path, v in matched.params.items()})
