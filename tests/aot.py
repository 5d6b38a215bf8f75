"""Compiling for TPUs on a machine that has none.

The ``libtpu`` wheel that ``jax[tpu]`` names compiles for any TPU topology without a chip, and says
what a program needs: ``compiled.memory_analysis()`` and ``compiled.cost_analysis()``, per chip.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = {"v5e": 2, "v6e": 2, "v5p": 3}  # dimensions of the chip grid
HOST = (2, 2, 1)  # chips of a host, at most


def tpu_mesh(generation: str, data: int = 1, tensor: int = 1) -> Mesh:
    """Mesh of axes (data, tensor) over compile-only chips; a power of two of them.

    Skips the test where libtpu is not installed.

    Raises:
      ValueError: for an unknown generation or another number of chips.
    """
    chips = data * tensor
    if generation not in AXES or chips & (chips - 1):
        raise ValueError(
            f"{data} x {tensor} chips of {generation!r}: use {sorted(AXES)} and a power of two"
        )
    pytest.importorskip("libtpu", reason='compiling for TPUs needs libtpu: pip install "jax[tpu]"')
    grid = [1] * AXES[generation]
    while np.prod(grid) < chips:
        grid[int(np.argmin(grid))] *= 2
    grid.sort()
    host = tuple(min(side, most) for side, most in zip([*grid, 1], HOST, strict=False))
    topology = topologies.get_topology_desc(
        platform="tpu",
        topology_name=f"{generation}:{'x'.join(map(str, grid))}",
        chips_per_host_bounds=host,
    )
    devices = np.array(topology.devices).reshape(data, tensor)
    return Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def struct(
    mesh: Mesh, shape: tuple[int, ...], dtype: Any, *spec: str | None
) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an argument, partitioned over ``mesh`` by ``spec``."""
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def compile_for(mesh: Mesh, f: Callable, *args: Any) -> jax.stages.Compiled:
    """``f`` compiled for the devices of ``mesh``; the arguments are made by :func:`struct`."""
    with jax.set_mesh(mesh):
        return jax.jit(f).lower(*args).compile()
