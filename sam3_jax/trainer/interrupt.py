"""Leaving in good order when the machine is taken away or somebody presses Ctrl-C."""

from __future__ import annotations

import signal
import sys
from typing import Any

import jax


class Interruption:
    """Context in which SIGTERM and SIGINT ask for an end after the current step.

    Several processes agree on the step: jax's preemption service passes on the SIGTERM that any of
    them was sent. A second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                try:
                    self._before[number] = signal.signal(number, self._ask)
                except ValueError:  # not the main thread
                    break
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self, step: int) -> bool:
        """Whether to stop after this step; all processes get the same answer."""
        if jax.process_count() == 1:
            return self._asked
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def _ask(self, number: int, _: Any) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
        print("stopping after this step, to save where the run is ...", file=sys.stderr)
