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
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from sam3_jax.checkpoint import CheckpointError
from sam3_jax.checkpoint.errors import first_line
from sam3_jax.checkpoint.tree import flatten, unflatten
from sam3_jax.trainer.config import CheckpointConfig
from sam3_jax.trainer.figures import Figures
from sam3_jax.trainer.state_shapes import abstract, check_same
from sam3_jax.trainer.store import open_store, remove_parts
from sam3_jax.training.state import TrainState

FIGURES = "figures.json"


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
        self._folder = Path(folder).absolute()
        self._config = config
        self._saving: int | None = None  # step that was not heard to be complete
        self._figures = Figures(self._folder / FIGURES, config.best)
        self._orbax = open_store(self._folder, self._kept)
        # Of a step that was validated and whose state never came to be, nothing is known.
        self._figures.read(self._complete())

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
        leaves = flatten(state)
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
        wanted = {path: abstract(path, leaf) for path, leaf in flatten(like).items()}
        with self._reading(step):
            metadata = self._orbax.metadata(step)
            position = metadata.custom_metadata["position"]
            if metadata.metadata is None:  # of arrays that are not there Orbax only warns
                raise ValueError("its arrays cannot be found")
            stored = flatten(metadata.metadata)
        check_same(folder, stored, wanted)
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
        # The same in all processes, a state under way among them.
        return self._figures.record(step, figures, self._known() - {step})

    def best(self) -> int | None:
        """Step of the complete state with the highest figure; None where none has one."""
        return self._figures.best(self._complete())

    def wait(self) -> None:
        """Waits for the save under way.

        Raises:
          CheckpointError: it failed. The states before it are as they were.
        """
        if self._saving is not None:
            step, self._saving = self._saving, None
            with self._writing(step):
                self._orbax.wait()
            # A thread of an earlier save that failed may have made its folder anew.
            remove_parts(self._folder)

    def close(self) -> None:
        """Waits for the save under way and ends Orbax's threads.

        Raises:
          CheckpointError: the save failed.
        """
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _known(self) -> set[int]:
        """Steps that are saved or being saved, and not being removed."""
        return {info.step for info in self._orbax.checkpoints}

    def _complete(self) -> set[int]:
        """Steps whose folders have their final names and are not being removed."""
        return {step for step in self._known() if (self._folder / str(step)).is_dir()}

    def _kept(self, steps: set[int]) -> set[int]:
        """What is kept of some states: the latest and the best.

        A run that was killed while it removed the others leaves parts of them, which look complete
        and go away after the next save.
        """
        latest = set(sorted(steps)[-self._config.keep :])
        return latest | ({self._figures.best(steps)} - {None})

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
            remove_parts(self._folder, step)
            latest = self.latest()
            rest = "there is none before it" if latest is None else f"step {latest} is intact"
            raise CheckpointError(
                f"{self._folder / str(step)}: saving failed, nothing of it was kept, {rest} "
                f"({first_line(error)}); free some space or make the folder writable, then start "
                "the same command again"
            ) from error

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
                f"{self._folder / str(step)}: damaged ({first_line(error)}); remove this folder, "
                f"and the run {other}"
            ) from error
