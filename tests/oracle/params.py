"""Our parameter tree from a transformers model: one set of weights for both sides of a test."""

from __future__ import annotations

import re

import flax.traverse_util
import numpy as np
import torch

from sam3_jax.config import ModelConfig
from sam3_jax.convert import hf_layouts, table
from sam3_jax.models.detector import init_shapes

_ENTRY = re.compile(r"(.*)\[(\d+)\]")  # one row of a parameter


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
    upstream = hf_layouts.to_upstream(type(model).__name__, state, config)
    if upstream.unknown or upstream.missing:
        raise ValueError(f"unknown tensors {upstream.unknown}, missing {upstream.missing}")
    shapes = flax.traverse_util.flatten_dict(init_shapes(config), sep="/")
    params: dict[str, np.ndarray] = {}
    for row in table.build_table(config):
        if row.source not in upstream.thunks:
            continue
        array, entry = upstream.thunks[row.source](), _ENTRY.fullmatch(row.targets[0])
        if entry:
            name, index = entry[1], int(entry[2])
            whole = params.setdefault(name, np.empty(shapes[name].shape, np.float32))
            whole[index] = array
            continue
        wanted = [shapes[target].shape for target in row.targets]
        params.update(zip(row.targets, table.to_params(row, array, wanted), strict=True))
    return flax.traverse_util.unflatten_dict(params, sep="/")
