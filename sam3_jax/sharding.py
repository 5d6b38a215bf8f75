"""Device mesh, and one rule that places every parameter on it.

Axes: ``data`` splits the batch, ``tensor`` splits heads and hidden units (Megatron style: the
first matrix of a pair by its outputs, the second by its inputs), ``fsdp`` splits batch and
parameters (training). Inference uses ``data`` and ``tensor``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sam3_jax.ops.attention import BATCH_AXES

# Parameter path -> dimension that the tensor axis splits. First match wins; the rest is replicated.
TENSOR_RULES: tuple[tuple[str, int], ...] = (
    (r"attn/[qkv]/kernel$", 1),  # (dim, heads, head_dim)
    (r"attn/[qkv]/bias$", 0),
    (r"attn/out/kernel$", 0),  # (heads, head_dim, dim)
    (r"(mlp|ffn)/fc1/kernel$", 1),
    (r"(mlp|ffn)/fc1/bias$", 0),
    (r"(mlp|ffn)/fc2/kernel$", 0),
    (r"token_embed/embedding$", 0),
)


def make_mesh(
    data: int | None = None, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Mesh of axes (data, tensor) over ``devices`` (default: all). ``data`` None takes the rest.

    Raises:
      ValueError: where the axes do not use the devices up.
    """
    devices = jax.devices() if devices is None else list(devices)
    if data is None:
        data = len(devices) // tensor
    if data * tensor != len(devices) or data < 1:
        raise ValueError(
            f"a mesh of data={data} x tensor={tensor} needs {data * tensor} devices, "
            f"there are {len(devices)}"
        )
    return jax.make_mesh(
        (data, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=devices
    )


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Partition of one parameter; a dimension that the axis does not divide stays whole."""
    tensor = mesh.shape.get("tensor", 1)
    for pattern, axis in TENSOR_RULES:
        if tensor > 1 and re.search(pattern, path):
            if shape[axis] % tensor:
                break
            return PartitionSpec(*[None] * axis, "tensor")
    return PartitionSpec()


def param_shardings(params: dict, mesh: Mesh) -> dict:
    """Shardings of a parameter tree (arrays or shapes), leaf by leaf."""

    def place(path: tuple, leaf: jax.ShapeDtypeStruct | jax.Array | np.ndarray) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, param_spec(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, params)


def on_one_device(params: dict) -> dict:
    """Shardings that put a parameter tree (arrays or shapes) whole onto the default device."""
    place = jax.device_put(0).sharding
    return jax.tree.map(lambda _: place, params)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over the mesh's batch axes."""
    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)
    return NamedSharding(mesh, PartitionSpec(axes))
