"""Orbax as the states of a run need it: what it keeps, how it writes, what a failure leaves."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from sam3_jax.checkpoint import CheckpointError

READ_BYTES = 512 * 2**20  # read at a time, in each process; all at once takes far more memory
UNFINISHED = ".orbax-checkpoint-tmp"  # in the names of folders that are being written


def open_store(folder: Path, kept: Callable[[set[int]], set[int]]) -> ocp.training.Checkpointer:
    """Opens a folder of states, and removes the leftovers of saves that were cut short.

    Args:
      folder: absolute; made if need be.
      kept: from all steps to those that stay; asked after each save.

    Raises:
      CheckpointError: the folder cannot be made or read.
    """
    logging.getLogger("absl").addFilter(_without_traces)
    context = ocp.Context()
    context.array.saving.use_compression = False  # hardly shrinks, and takes longer
    context.asynchronous.create_directories_asynchronously = False  # or errors show late
    context.memory.read_concurrent_bytes = READ_BYTES
    try:
        return ocp.training.Checkpointer(
            folder,
            context=context,
            preservation_policy=_Preserve(kept),
            cleanup_tmp_directories=True,
        )
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be used ({error}); choose another output, or make it writable"
        ) from error


def remove_parts(folder: Path, step: int | None = None) -> None:
    """Removes what a failed save left, which other threads may still be adding files to.

    Args:
      folder: of the states.
      step: None: all, when no state is being written.
    """
    if jax.process_index() != 0:
        return
    for part in folder.glob(f"{'*' if step is None else step}{UNFINISHED}*"):
        for _ in range(20):
            shutil.rmtree(part, ignore_errors=True)
            if not part.exists():
                break
            time.sleep(0.1)


class _Preserve:
    """What Orbax asks after each save; it removes the rest once the new state is complete."""

    def __init__(self, kept: Callable[[set[int]], set[int]]) -> None:
        self._kept = kept

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        kept = self._kept({info.step for info in checkpoints})
        return [info.step in kept for info in checkpoints]


def _without_traces(record: logging.LogRecord) -> bool:
    """Leaves out the traces that each of Orbax's threads logs of an error that is raised anyway.

    A full disk would take 1800 lines.
    """
    return not (record.exc_info and "orbax" in record.pathname)
