"""Folders that are written beside their place and take it when they are complete."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from sam3_jax.checkpoint.errors import CheckpointError, first_line


@contextlib.contextmanager
def staging_folder(
    target: Path, need: int, *, file: bool = False, replace: bool = False
) -> Iterator[Path]:
    """A folder beside ``target`` that takes its place if all goes well, and vanishes if not.

    Args:
      target: must not exist or be an empty folder, unless it is to be replaced.
      need: bytes that will be written.
      file: the target is the file of its name in the folder, not the folder.
      replace: what is there goes away, after the new one is complete.

    Raises:
      CheckpointError: when the place is taken, the disk is too small, or writing fails.
    """
    taken = target.exists() and (file or not target.is_dir() or any(target.iterdir()))
    if taken and not replace:
        raise CheckpointError(f"{target}: exists already; choose another output or remove it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise CheckpointError(f"{target.parent}: cannot be written to ({error})") from error
    if free < need:
        raise CheckpointError(
            f"{target}: needs {need / 1e9:.2f} GB and {free / 1e9:.2f} GB are free on that disk; "
            "free some space or choose an output on another disk"
        )
    folder = staging_name(target)
    try:
        folder.mkdir()
        yield folder
        _put_in_place(folder / target.name if file else folder, target)
    except (OSError, ValueError, RuntimeError) as error:  # tensorstore has its own for a full disk
        raise CheckpointError(
            f"{target}: writing failed, nothing was kept: {first_line(error)}"
        ) from error
    finally:
        _remove(folder)


def staging_name(target: Path) -> Path:
    """Where a checkpoint is written first; processes that write together agree on it."""
    mark = os.getpid() if jax.process_count() == 1 else "shared"
    return target.with_name(f".{target.name}.{mark}.partial")


def _put_in_place(new: Path, target: Path) -> None:
    if not target.exists() or target.is_file():
        os.replace(new, target)
        return
    old = new.with_name(f"{new.name}.old")  # a folder only replaces an empty one
    os.replace(target, old)
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old)


def _remove(folder: Path) -> None:
    """Removes a folder that threads of a failed write may still be adding files to."""
    for _ in range(20):
        if not folder.exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)
