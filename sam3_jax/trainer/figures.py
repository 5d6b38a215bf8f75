"""Validation figures of a run's states, in a file beside them: they say which state is the best."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import jax

from sam3_jax.checkpoint import CheckpointError


class Figures:
    """The figure ``name`` (``checkpoint.best``) of each validated step."""

    def __init__(self, file: Path, name: str) -> None:
        self._file = file
        self._name = name
        self._values: dict[int, float] = {}

    def read(self, steps: set[int]) -> None:
        """Takes over what the file says of ``steps``, if there is one.

        Raises:
          CheckpointError: it cannot be read.
        """
        try:
            stored = json.loads(self._file.read_text())
            values = {int(step): float(value) for step, value in stored.items()}
        except FileNotFoundError:
            values = {}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"{self._file}: cannot be read ({error}); remove it, and the best state so far "
                "counts as any other"
            ) from error
        self._values = {step: value for step, value in values.items() if step in steps}

    def record(self, step: int, figures: dict[str, float], others: set[int]) -> bool:
        """Remembers the figure of a step; whether it beats those of ``others``.

        Without masks there is no "segm/..." figure; "bbox/..." takes its place.

        Raises:
          CheckpointError: the file cannot be written.
          ValueError: the figure is not among ``figures``.
        """
        name = self._name
        value = figures.get(name, figures.get(name.replace("segm/", "bbox/")))
        if value is None:
            raise ValueError(f"checkpoint.best={name!r} is not one of {', '.join(sorted(figures))}")
        if not math.isfinite(value):
            return False
        before = max((self._values[s] for s in others & self._values.keys()), default=-math.inf)
        self._values[step] = float(value)
        if jax.process_index() == 0:
            self._write()
        return value > before

    def best(self, steps: set[int]) -> int | None:
        """Which of ``steps`` has the highest figure, the last of equals; None where none has."""
        known = steps & self._values.keys()
        return max(known, key=lambda step: (self._values[step], step), default=None)

    def _write(self) -> None:
        new = self._file.with_suffix(".new")
        try:
            new.write_text(json.dumps(self._values) + "\n")
            os.replace(new, self._file)
        except OSError as error:
            raise CheckpointError(
                f"{self._file}: cannot be written ({error}); free some space or make it writable, "
                "then start the same command again"
            ) from error
