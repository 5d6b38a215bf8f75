"""States of a training run on disk: saved beside the training, complete or not there at all.

A folder of Orbax checkpoints, one for each step that is kept, named after it::

    1000/         state (arrays) and position (JSON), written under another name, then renamed
    1500/
    figures.json  validation figure of each validated step, which says what the best one is

Orbax fetches the arrays from the devices before ``save`` returns, so the next step may take their
buffers over, and writes them from threads. The host holds a copy of the state until then. Arrays
are stored by path and whole, whatever devices they were on: any number of devices and of
processes, with another mesh, can read them. All processes call each method, with the same values,
and see the same folder.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from sam3_jax.checkpoint import CheckpointError, flatten, unflatten
from sam3_jax.trainer.config import CheckpointConfig
from sam3_jax.training.state import TrainState

FIGURES = "figures.json"
READ_BYTES = 512 * 2**20  # read at a time, in each process; all at once takes far more memory
UNFINISHED = ".orbax-checkpoint-tmp"  # in the names of folders that are being written
SHOWN = 3  # differing arrays that an error names


class RunCheckpoints:
    """The ``config.keep`` latest states of a run and the best one.

    Leftovers of saves that were cut short go away when it is made.

    Raises:
      CheckpointError: the folder cannot be made or read.
      ValueError: nothing is to be kept.
    """

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        if config.keep < 1:
            raise ValueError(f"checkpoint.keep={config.keep}: keep at least one")
        logging.getLogger("absl").addFilter(_without_traces)
        self._folder = Path(folder).absolute()
        self._config = config
        self._saving: int | None = None  # step that was not heard to be complete
        self._figures: dict[int, float] = {}
        self._orbax = self._open()
        complete = self._complete()
        # Of a step that was validated and whose state never came to be, nothing is known.
        self._figures = {s: v for s, v in self._read_figures().items() if s in complete}

    def save(
        self,
        step: int,
        state: TrainState,
        position: dict[str, Any],
        *,
        metrics: dict[str, float] | None = None,
        wait: bool = False,
    ) -> None:
        """Starts to write a state; returns as soon as its buffers may be taken over.

        An error of the save before shows here: then nothing of this one was written, and it may be
        called again.

        Args:
          step: number of batches that the state has seen, above those of all states in the folder.
          state: on any devices.
          position: what a resume needs beside it, anything JSON can hold.
          metrics: figures of this state, if known already: see :meth:`record_best`.
          wait: returns when the state is complete.

        Raises:
          CheckpointError: this save or the one before failed, or later states are in the way.
        """
        self.wait()
        latest = max(self._complete(), default=None)
        if latest is not None and step <= latest:
            raise CheckpointError(
                f"{self._folder}: has a state of step {latest} already, so step {step} cannot be "
                "saved there; resume from it, choose another output, or remove the folder"
            )
        leaves = _leaves(state)
        self._check_space(step, sum(leaf.nbytes for leaf in leaves.values()))
        if metrics is not None:
            self.record_best(step, metrics)
        metadata = {"position": json.loads(json.dumps(position))}  # numpy's numbers fail here
        with self._writing(step):
            self._orbax.save_async(step, unflatten(leaves), force=True, custom_metadata=metadata)
            self._saving = step
        if wait:
            self.wait()

    def latest(self) -> int | None:
        """Step of the newest complete state; None where there is none."""
        return max(self._kept(self._complete()), default=None)

    def restore(
        self, like: TrainState, step: int | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Reads a state, each device its share.

        Args:
          like: arrays, or shapes with shardings (which take no memory): the state that is wanted.
          step: default the latest.

        Returns:
          The state and the position that were saved together.

        Raises:
          CheckpointError: no such state, one of another model or optimizer, or a damaged one.
        """
        self.wait()
        kept = self._kept(self._complete())
        step = max(kept, default=None) if step is None else step
        if step not in kept:
            found = ", ".join(map(str, sorted(kept))) or "none"
            wanted = "state" if step is None else f"complete state of step {step}"
            raise CheckpointError(f"{self._folder}: has no {wanted}; there are: {found}")
        folder = self._folder / str(step)
        wanted = {path: _abstract(path, leaf) for path, leaf in _leaves(like).items()}
        with self._reading(step):
            metadata = self._orbax.metadata(step)
            position = metadata.custom_metadata["position"]
            stored = flatten(metadata.metadata)
        _check_same(folder, stored, wanted)
        with self._reading(step):
            leaves = flatten(self._orbax.load(step, unflatten(wanted)))
        order = [leaves[path] for path in wanted]
        return jax.tree.unflatten(jax.tree.structure(like), order), position

    def record_best(self, step: int, figures: dict[str, float]) -> bool:
        """Remembers the figure ``config.best`` of a step, before or after its state is saved.

        Without masks there is no "segm/..." figure; "bbox/..." takes its place.

        Returns:
          Whether it beats those of all states in the folder: a state of this step will be kept.

        Raises:
          CheckpointError: the figures cannot be written.
          ValueError: ``config.best`` is not among them.
        """
        name = self._config.best
        value = figures.get(name, figures.get(name.replace("segm/", "bbox/")))
        if value is None:
            raise ValueError(f"checkpoint.best={name!r} is not one of {', '.join(sorted(figures))}")
        if not math.isfinite(value):
            return False
        others = self._known() - {step}  # the same in all processes, one under way among them
        before = max((self._figures[s] for s in others & self._figures.keys()), default=-math.inf)
        self._figures[step] = float(value)
        if jax.process_index() == 0:
            self._write_figures()
        return value > before

    def best(self) -> int | None:
        """Step of the complete state with the highest figure; None where none has one."""
        return self._best(self._complete())

    def wait(self) -> None:
        """Waits for the save under way.

        Raises:
          CheckpointError: it failed. The states before it are as they were.
        """
        if self._saving is not None:
            step, self._saving = self._saving, None
            with self._writing(step):
                self._orbax.wait()

    def close(self) -> None:
        """Waits for the save under way and ends Orbax's threads.

        Raises:
          CheckpointError: the save failed.
        """
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _open(self) -> ocp.training.Checkpointer:
        context = ocp.Context()
        context.array.saving.use_compression = False  # hardly shrinks, and takes longer
        context.asynchronous.create_directories_asynchronously = False  # or errors show late
        context.memory.read_concurrent_bytes = READ_BYTES
        try:
            return ocp.training.Checkpointer(
                self._folder,
                context=context,
                preservation_policy=_Preserve(self._kept),
                cleanup_tmp_directories=True,
            )
        except OSError as error:
            raise CheckpointError(
                f"{self._folder}: cannot be used ({error}); choose another output, or make it "
                "writable"
            ) from error

    def _known(self) -> set[int]:
        """Steps that are saved or being saved, and not being removed."""
        return {info.step for info in self._orbax.checkpoints}

    def _complete(self) -> set[int]:
        """Steps whose folders have their final names and are not being removed."""
        return {step for step in self._known() if (self._folder / str(step)).is_dir()}

    def _best(self, steps: set[int]) -> int | None:
        known = steps & self._figures.keys()
        return max(known, key=lambda step: (self._figures[step], step), default=None)

    def _kept(self, steps: set[int]) -> set[int]:
        """What is kept of some states: the latest and the best.

        A run that was killed while it removed the others leaves parts of them, which look complete
        and go away after the next save.
        """
        latest = set(sorted(steps)[-self._config.keep :])
        return latest | ({self._best(steps)} - {None})

    def _check_space(self, step: int, need: int) -> None:
        """Raises while there is room for the error message; several processes must not disagree."""
        if jax.process_count() > 1 or not self._folder.is_dir():
            return
        free = shutil.disk_usage(self._folder).free
        if free < need:
            raise CheckpointError(
                f"{self._folder / str(step)}: needs {need / 1e9:.2f} GB and {free / 1e9:.2f} GB "
                "are free on that disk; free some space, or lower checkpoint.keep and remove a "
                "state, then start the same command again"
            )

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # OSError, or tensorstore's own for a full disk
            self._saving = None
            self._orbax.reload()  # finds the states that are there
            self._remove_parts(step)
            latest = self.latest()
            rest = "there is none before it" if latest is None else f"step {latest} is intact"
            raise CheckpointError(
                f"{self._folder / str(step)}: saving failed, nothing of it was kept, {rest} "
                f"({_first_line(error)}); free some space or make the folder writable, then start "
                "the same command again"
            ) from error

    def _remove_parts(self, step: int) -> None:
        """Removes what a failed save left, which other threads may still be adding files to."""
        if jax.process_index() != 0:
            return
        for part in self._folder.glob(f"{step}{UNFINISHED}*"):
            for _ in range(20):
                shutil.rmtree(part, ignore_errors=True)
                if not part.exists():
                    break
                time.sleep(0.1)

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Turns whatever Orbax and tensorstore raise on damaged files into a CheckpointError."""
        try:
            yield
        except (MemoryError, jax.errors.JaxRuntimeError):  # too small a device, a lost process
            raise
        except Exception as error:  # many kinds, none documented
            rest = sorted(self._kept(self._complete()) - {step})
            other = f"goes on from step {rest[-1]}" if rest else "starts again"
            raise CheckpointError(
                f"{self._folder / str(step)}: damaged ({_first_line(error)}); remove this folder, "
                f"and the run {other}"
            ) from error

    def _read_figures(self) -> dict[int, float]:
        file = self._folder / FIGURES
        try:
            return {int(step): float(v) for step, v in json.loads(file.read_text()).items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"{file}: cannot be read ({error}); remove it, and the best state so far counts "
                "as any other"
            ) from error

    def _write_figures(self) -> None:
        file = self._folder / FIGURES
        new = file.with_suffix(".new")
        try:
            new.write_text(json.dumps(self._figures) + "\n")
            os.replace(new, file)
        except OSError as error:
            raise CheckpointError(
                f"{file}: cannot be written ({error}); free some space or make it writable, then "
                "start the same command again"
            ) from error


class _Preserve:
    """What Orbax asks after each save; it removes the rest once the new state is complete."""

    def __init__(self, kept: Callable[[set[int]], set[int]]) -> None:
        self._kept = kept

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        kept = self._kept({info.step for info in checkpoints})
        return [info.step in kept for info in checkpoints]


def _leaves(state: TrainState) -> dict[str, Any]:
    """Arrays by path, in the order of the state's leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _abstract(path: str, leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    if leaf.sharding is None:
        raise ValueError(f"{path}: give shapes with shardings, or arrays")
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _check_same(folder: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
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


def _without_traces(record: logging.LogRecord) -> bool:
    """Leaves out the traces that each of Orbax's threads logs of an error that is raised anyway.

    A full disk would take 1800 lines.
    """
    return not (record.exc_info and "orbax" in record.pathname)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:400]
