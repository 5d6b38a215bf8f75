"""Device mesh, and one rule that places every parameter on it.

Axes: ``data`` splits the batch, ``tensor`` splits heads and hidden units (Megatron style: the
first matrix of a pair by its outputs, the second by its inputs), ``fsdp`` splits batch and
parameters (training). Inference uses ``data`` and ``tensor``.

The rule reads paths and shapes only, so it also places what is shaped like the parameters: the
optimizer's moments, averages, the whole training state.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

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
# Smaller arrays (256 KiB of float32) stay whole on the fsdp axis: fetching them would cost more
# time than they cost memory.
FSDP_MIN_SIZE = 1 << 16


def make_mesh(
    data: int | None = None,
    tensor: int = 1,
    *,
    fsdp: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Mesh of axes (data, tensor) over ``devices`` (default: all). ``data`` None takes the rest.

    With ``fsdp`` above 1 the axes are (data, fsdp, tensor).

    Raises:
      ValueError: where the axes do not use the devices up.
    """
    devices = jax.devices() if devices is None else list(devices)
    if data is None:
        data = len(devices) // (fsdp * tensor)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    if fsdp == 1:
        del sizes["fsdp"]
    needed = math.prod(sizes.values())
    if needed != len(devices) or data < 1:
        asked = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(f"a mesh of {asked} needs {needed} devices, there are {len(devices)}")
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=devices,
    )


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Partition of one parameter; a dimension that the axis does not divide stays whole.

    The tensor axis splits what :data:`TENSOR_RULES` names, the fsdp axis the largest dimension that
    is left of anything with at least :data:`FSDP_MIN_SIZE` elements.
    """
    tensor, fsdp = (mesh.shape.get(name, 1) for name in ("tensor", "fsdp"))
    split: dict[int, str] = {}
    if tensor > 1:
        axis = next((axis for pattern, axis in TENSOR_RULES if re.search(pattern, path)), None)
        if axis is not None and shape[axis] % tensor == 0:
            split[axis] = "tensor"
    if fsdp > 1 and math.prod(shape) >= FSDP_MIN_SIZE:
        free = [i for i, size in enumerate(shape) if i not in split and size % fsdp == 0]
        if free:
            split[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*(split.get(i) for i in range(max(split, default=-1) + 1)))


def param_shardings(params: PyTree, mesh: Mesh) -> PyTree:
    """Shardings of a tree of parameters or of a training state (arrays or shapes), by leaf."""

    def place(path: tuple, leaf: jax.ShapeDtypeStruct | jax.Array | np.ndarray) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, param_spec(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, params)


def constrain_params(params: PyTree) -> PyTree:
    """Inside ``jit``: holds a tree to the rule on the mesh in use (``jax.set_mesh``), if any."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.axis_names:
        return params

    def hold(path: tuple, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jax.lax.with_sharding_constraint(leaf, param_spec(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(hold, params)


def constrain_batch(batch: PyTree) -> PyTree:
    """Inside ``jit``: leading axes over the batch axes of the mesh in use, if any.

    Raises:
      ValueError: where they do not divide a leading axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)
    if not axes:
        return batch
    shards = math.prod(mesh.shape[axis] for axis in axes)
    for leaf in jax.tree.leaves(batch):
        if leaf.shape[0] % shards:
            raise ValueError(
                f"a batch of {leaf.shape[0]} cannot be split over {shards} devices "
                f"({' x '.join(axes)}): pad it to a multiple of {shards}"
            )
    return jax.tree.map(
        lambda leaf: jax.lax.with_sharding_constraint(leaf, PartitionSpec(axes)), batch
    )


def on_one_device(params: PyTree) -> PyTree:
    """Shardings that put a tree of parameters or state whole onto the default device."""
    with jax.ensure_compile_time_eval():  # callers may be traced, for shapes alone
        place = jax.device_put(0).sharding
    return jax.tree.map(lambda _: place, params)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over the mesh's batch axes."""
    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)
    return NamedSharding(mesh, PartitionSpec(axes))
