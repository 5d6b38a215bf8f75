"""Writes checkpoints: all of one or nothing, group by group of arrays."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from sam3_jax import config as config_lib
from sam3_jax.checkpoint.description import CONFIG, FORMAT_VERSION, is_checkpoint
from sam3_jax.checkpoint.parts import WHOLE
from sam3_jax.checkpoint.staging import staging_folder, staging_name
from sam3_jax.checkpoint.tree import flatten, unflatten
from sam3_jax.config import ModelConfig

GROUP_BYTES = 256 * 2**20  # written at a time, which bounds the memory that saving takes


def save(
    path: str | os.PathLike,
    params: dict,
    config: ModelConfig,
    *,
    unused: dict[str, np.ndarray] | None = None,
    metadata: dict[str, Any] | None = None,
    parts: Sequence[str] = WHOLE,
    dtype: Any = None,
    overwrite: bool = False,
    progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Writes a checkpoint, all of it or nothing.

    Needs little memory beside the arrays themselves, which may be views of mapped files. Where jax
    runs in several processes all of them must call this, with the same arrays and a shared folder.

    Args:
      path: folder to make.
      params: nested dictionary of arrays (NumPy, or jax that this process can address).
      config: the model they belong to.
      unused: further arrays by name, stored as they are.
      metadata: anything JSON can hold about their origin.
      parts: which of :data:`sam3_jax.checkpoint.PARTS` the parameters make up.
      dtype: what the parameters are cast to; None keeps them.
      overwrite: replace a checkpoint that is there; anything else is never replaced.
      progress: called with the number of bytes after each group of arrays.

    Raises:
      CheckpointError: when the folder is taken, the disk is full, or writing fails.
    """
    target = Path(path).absolute()
    cast = np.dtype(dtype) if dtype is not None else None
    leaves, kept = flatten(params), dict(unused or {})
    need = sum(leaf.size * (cast or leaf.dtype).itemsize for leaf in leaves.values())
    need += sum(leaf.nbytes for leaf in kept.values())
    description = {
        "format_version": FORMAT_VERSION,
        "arch": config.arch,
        "parts": list(parts),
        "model": config_lib.to_dict(config),
        "metadata": metadata or {},
    }
    replace = overwrite and is_checkpoint(target)

    def write(folder: Path) -> None:
        _meet()
        _write_arrays(folder / "params", leaves, cast, progress)
        if kept:
            _write_arrays(folder / "unused", kept, None, progress)
        _meet()

    if jax.process_index():  # the first process makes the folder and puts it in its place
        write(staging_name(target))
        return
    with staging_folder(target, need, replace=replace) as folder:
        write(folder)
        (folder / CONFIG).write_text(json.dumps(description, indent=2) + "\n")


def _meet() -> None:
    """Waits for all processes: Orbax wants them to write together."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("sam3_jax checkpoint")


def _write_arrays(
    folder: Path,
    leaves: dict[str, Any],
    dtype: np.dtype | None,
    progress: Callable[[int], object],
) -> None:
    """Writes arrays group by group into one Orbax checkpoint."""
    context = ocp.Context()
    context.array.saving.use_compression = False  # weights hardly shrink, and loading takes longer
    context.memory.deepcopy_host_arrays = False
    with context:
        for group in _groups(leaves):
            arrays = {
                name: np.asarray(leaf, dtype or leaf.dtype, order="C")
                for name, leaf in group.items()
            }
            ocp.partial.save(folder, unflatten(arrays))
            progress(sum(leaf.nbytes for leaf in group.values()))
        ocp.partial.finalize(folder)


def _groups(leaves: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Neighbouring leaves, about GROUP_BYTES together."""
    group: dict[str, Any] = {}
    size = 0
    for name, leaf in leaves.items():
        if group and size + leaf.nbytes > GROUP_BYTES:
            yield group
            group, size = {}, 0
        group[name] = leaf
        size += leaf.nbytes
    if group:
        yield group
