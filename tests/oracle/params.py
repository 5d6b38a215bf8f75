"""Our parameter tree from a transformers model: one set of weights for both sides of a test."""

from __future__ import annotations

import torch

from sam3_jax.checkpoint import flatten, unflatten
from sam3_jax.config import ModelConfig
from sam3_jax.convert.layout import hf_layout
from sam3_jax.convert.table import to_params
from sam3_jax.models.detector import init_shapes


def params_from_hf(model: torch.nn.Module, config: ModelConfig) -> dict:
    """Nested parameters (numpy, float32) that hold the weights of a transformers model.

    Args:
      model: one of the four SAM 3 classes, at the sizes of ``config``.
      config: the sizes.

    Returns:
      The tree without what the class lacks: trees of several classes may be merged. No class has
      the point branch of the geometry encoder (``geometry/point_*``).
    """
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    layout = hf_layout(type(model).__name__, config)
    known = {row.source for row in layout.rows} | {item.source for item in layout.unused}
    if differing := known.union(layout.copies).symmetric_difference(state):
        raise ValueError(f"named by the model or the layout, not both: {sorted(differing)}")
    shapes = flatten(init_shapes(config))
    params = {}
    for row in layout.rows:
        wanted = [shapes[target].shape for target in row.targets]
        params |= zip(row.targets, to_params(row, state[row.source], wanted), strict=True)
    return unflatten(params)
