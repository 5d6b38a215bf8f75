"""Shapes of a state's arrays: what to read, and whether what is stored is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from sam3_jax.checkpoint import CheckpointError

SHOWN = 3  # differing arrays that an error names


def abstract(path: str, leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The shape of a leaf, and where it is to go.

    Raises:
      ValueError: a shape without a sharding.
    """
    if leaf.sharding is None:
        raise ValueError(f"{path}: give shapes with shardings, or arrays")
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def shape_of(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    """An array's shape and place, which take no memory."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def check_same(folder: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises unless both have the same arrays. Orbax would cast, and say little about the rest."""

    def text(leaf: Any) -> str:
        return "missing" if leaf is None else f"{tuple(leaf.shape)} {np.dtype(leaf.dtype)}"

    differing = []
    for path in dict.fromkeys([*wanted, *stored]):
        there, here = text(stored.get(path)), text(wanted.get(path))
        if there != here:
            differing.append(f"{path} is {there} there and {here} now")
    if differing:
        more = len(differing) - SHOWN
        raise CheckpointError(
            f"{folder}: is of another model or optimizer: {'; '.join(differing[:SHOWN])}"
            f"{f'; and {more} more' if more > 0 else ''}. Set the configuration (model, lora, "
            "optimizer with its ema and freezing) back, or choose another output"
        )
