"""One row of the conversion table: how a tensor makes parameters, and they make it again.

All kinds are permutations, so that both directions are exact to the bit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

POS_EMBED_PARAM = "vision/trunk/pos_embed"  # a grid; the source has one axis for its cells

Shape = tuple[int, ...]


class Row(NamedTuple):
    """One tensor of the source and the parameters (paths joined by "/") that it makes.

    Kinds: ``copy`` (same numbers, our shape), ``linear`` (transposed; our leading axis is the
    input), ``linear_out`` (transposed; our trailing axis is the output), ``conv`` (OIHW to HWIO,
    and a transposed convolution's IOHW to HWOI). Several targets split the source's first axis.
    ``ones``: positions of the source's axes of length 1 that ours lacks.
    """

    source: str
    targets: tuple[str, ...]
    kind: str
    ones: tuple[int, ...] = ()


def source_shape(row: Row, shapes: list[Shape]) -> Shape:
    """Shape of the source, from those of its targets (``pos_embed``: without the class row)."""
    shape = shapes[0]
    if row.kind == "linear":
        flat: Shape = (math.prod(shape[1:]), shape[0])
    elif row.kind == "linear_out":
        flat = (shape[-1], math.prod(shape[:-1]))
    elif row.kind == "conv":
        flat = (shape[3], shape[2], shape[0], shape[1])
    elif row.targets == (POS_EMBED_PARAM,):
        flat = (shape[0] * shape[1], shape[2])
    elif len(row.targets) > 1:
        flat = (math.prod(shape),)
    elif row.targets[0].endswith("]"):
        flat = (1, shape[-1])
    elif row.targets[0].endswith(("/q/bias", "/k/bias", "/v/bias")):
        flat = (math.prod(shape),)
    else:
        flat = shape
    flat = (len(row.targets) * flat[0], *flat[1:])
    for axis in row.ones:
        flat = (*flat[:axis], 1, *flat[axis:])
    return flat


def to_params(row: Row, array: np.ndarray, shapes: list[Shape]) -> list[np.ndarray]:
    """Arrays of the row's targets (views where possible)."""
    parts = np.split(array, len(row.targets)) if len(row.targets) > 1 else [array]
    if row.kind in ("linear", "linear_out"):
        parts = [part.T for part in parts]
    elif row.kind == "conv":
        parts = [part.transpose(2, 3, 1, 0) for part in parts]
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def from_params(row: Row, arrays: list[np.ndarray]) -> np.ndarray:
    """The source tensor of a row from its targets: the inverse of :func:`to_params`."""
    shape = source_shape(row, [array.shape for array in arrays])
    if row.kind == "linear":
        parts = [array.reshape(array.shape[0], -1).T for array in arrays]
    elif row.kind == "linear_out":
        parts = [array.reshape(-1, array.shape[-1]).T for array in arrays]
    elif row.kind == "conv":
        parts = [array.transpose(3, 2, 0, 1) for array in arrays]
    else:
        parts = [array.reshape(shape[0] // len(arrays), *shape[1:]) for array in arrays]
    return np.concatenate(parts).reshape(shape) if len(parts) > 1 else parts[0].reshape(shape)
