"""Reads checkpoints: whole or in part, cast and spread over devices on the way."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from sam3_jax.checkpoint.description import read_description, read_model
from sam3_jax.checkpoint.errors import CheckpointError, first_line
from sam3_jax.checkpoint.memory import returning_memory
from sam3_jax.checkpoint.parts import in_parts
from sam3_jax.checkpoint.sizes import check_sizes
from sam3_jax.checkpoint.tree import flatten, unflatten
from sam3_jax.config import ModelConfig

# Read at a time: left to itself, Orbax reads all at once, which takes half as much memory again
# and, for the pages it touches, twice the time.
READ_BYTES = 512 * 2**20
# Parameters of which nothing but their rounding to the compute dtype is ever used.
_COMPUTE_ONLY = re.compile(r"^(vision|text)/.*/kernel$")


class Loaded(NamedTuple):
    """What :func:`load` gives."""

    params: dict  # nested; NumPy arrays, or jax ones where shardings were given
    config: ModelConfig
    metadata: dict[str, Any]  # origin, as `save` was given it, with "parts"


def load(
    path: str | os.PathLike,
    *,
    dtype: Any = None,
    parts: Sequence[str] | None = None,
    shardings: Callable[[dict], dict] | None = None,
) -> Loaded:
    """Reads a checkpoint.

    Args:
      path: folder that :func:`sam3_jax.checkpoint.save` or ``convert_torch_weights.py`` wrote.
      dtype: what the backbones' matrices, nine tenths of all, are cast to while reading: the
        compute dtype, in which they are multiplied anyway. The rest, which takes part in float32
        arithmetic, keeps its precision. None casts nothing.
      parts: which of :data:`sam3_jax.checkpoint.PARTS` to read; None reads all there are.
      shardings: from the tree of shapes to the tree of shardings, to read each device's share
        straight onto it (``functools.partial(param_shardings, mesh=mesh)``); None gives NumPy
        arrays.

    Raises:
      CheckpointError: when there is no usable checkpoint, or it lacks one of ``parts``.
    """
    folder = Path(path).absolute()
    description = read_description(folder)
    config = read_model(folder, description)
    held = list(description["parts"])
    for part in parts or ():
        if part not in held and not (part == "clicks" and "tracker" in held):
            raise CheckpointError(
                f"{folder}: has no {part!r} part, only {', '.join(held)}; convert the full weights "
                "again with --part all"
            )
    with _reading(folder / "params"):
        stored = flatten(ocp.metadata(folder / "params").metadata)
    check_sizes(folder, config, {name: leaf.shape for name, leaf in stored.items()})
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, np.dtype(load_dtype(name, leaf, dtype)))
        for name, leaf in stored.items()
        if in_parts(name, parts or held)
    }
    if shardings is None:
        # What Orbax takes for "a NumPy array like this": one that occupies no memory.
        like = {n: np.broadcast_to(np.zeros((), s.dtype), s.shape) for n, s in wanted.items()}
    else:
        places = flatten(shardings(unflatten(wanted)))
        like = {
            name: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=places[name])
            for name, shape in wanted.items()
        }
    largest = max((leaf.size * leaf.dtype.itemsize for leaf in wanted.values()), default=0)
    with returning_memory():
        params = _read_arrays(folder / "params", unflatten(like), max(READ_BYTES, largest))
    metadata = {**description.get("metadata", {}), "parts": list(parts or held)}
    return Loaded(params, config, metadata)


def load_dtype(name: str, leaf: Any, dtype: Any) -> Any:
    """The dtype that :func:`load` gives one parameter.

    float16 is for files alone, to make them small: in memory it becomes float32.
    """
    if dtype is not None and _COMPUTE_ONLY.search(name):
        return dtype
    return np.float32 if leaf.dtype == np.float16 else leaf.dtype


def load_unused(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Tensors of the release that nothing reads, by their names there; maybe none.

    Raises:
      CheckpointError: when there is no usable checkpoint.
    """
    folder = Path(path).absolute()
    read_description(folder)
    if not (folder / "unused").is_dir():
        return {}
    return _read_arrays(folder / "unused", None, None)


def _read_arrays(folder: Path, like: dict | None, at_once: int | None) -> dict:
    """Reads what ``like`` names (None: everything), at most ``at_once`` bytes at a time."""
    context = ocp.Context()
    context.memory.read_concurrent_bytes = at_once
    context.pytree.loading.partial_load = True
    with _reading(folder), context:
        return ocp.load(folder, like)


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Turns whatever Orbax and tensorstore raise on damaged files into a CheckpointError."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # many kinds, none documented
        raise CheckpointError(
            f"{folder}: damaged or incomplete, convert the weights again or copy the folder again "
            f"({first_line(error)})"
        ) from error
