"""What a training run says: a line of progress, ``log.jsonl`` and events for TensorBoard.

``log.jsonl`` has an object a line with ``kind``, ``step`` (how many are done) and ``time`` (seconds
since 1970). Numbers that are not finite are null. The kinds:

- ``start``: a run starts or goes on after ``step``; with ``schema_version`` and what the other
  lines refer to. Nothing that was written is ever changed: this line supersedes those before it
  that are about later steps, and :func:`read_log` leaves them out. (TensorBoard hides them too.)
- ``train``: means over the ``steps`` steps since the line before, of finite values; ``rate`` and
  the counts of skipped steps are the latest. ``step_s``: seconds a step; ``images_per_s``;
  ``data_wait``: share of the time spent waiting for data; ``mfu``: see ``flops.py``, null where the
  device's peak is unknown. Steps in which a program was compiled are in none of these four but in
  ``compile_s``, their seconds; the first step counts as one.
- ``valid``: figures of a validation.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from sam3_jax.inference.files import named_errors
from sam3_jax.trainer.config import LogConfig
from sam3_jax.trainer.events import Events
from sam3_jax.trainer.flops import peak_flops
from sam3_jax.trainer.window import Window, summary

SCHEMA_VERSION = 1
FILE = "log.jsonl"
PROFILE = "profile"  # folder of traces
COMPILED = "/jax/core/compile/backend_compile_duration"  # jax's event, cached programs included
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class RunLog:
    """Log of one run; a log that is not ``active`` (processes other than 0) does nothing.

    The clock of the first step starts here. Close it at the end, whatever happened.
    """

    def __init__(
        self,
        folder: Path,
        config: LogConfig,
        *,
        steps: int,
        start: int,
        images_per_step: int,
        flops_per_step: float | None,
        active: bool = True,
    ):
        """Begins or goes on.

        Args:
          folder: an existing one, of the run.
          steps: of the whole run.
          start: steps that are done.
          images_per_step: of all processes.
          flops_per_step: model FLOPs of all devices, for ``mfu``.

        Raises:
          OSError: when a file cannot be written, here and in all methods.
        """
        self._active, self._config, self._path = active, config, folder / FILE
        self._steps, self._images, self._done = steps, images_per_step, start
        self._window, self._compiled, self._tracing = Window(), True, False
        self._since = time.perf_counter()
        if not active:
            return
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak_rate = None  # steps a second that the devices could do at best
        if peak and flops_per_step:
            self._peak_rate = peak * jax.device_count() / flops_per_step
        with named_errors(self._path):
            _cut_torn_line(self._path)
        header = {"schema_version": SCHEMA_VERSION, "steps": steps, "images_per_step": self._images}
        device = {"device": jax.devices()[0].device_kind, "devices": jax.device_count()}
        flops = {"flops_per_step": flops_per_step, "peak_flops_per_device": peak}
        self._write("start", start, {**header, **device, **flops})
        self._closing = contextlib.ExitStack()
        self._events = None
        if config.tensorboard:
            self._events = self._closing.enter_context(
                contextlib.closing(Events(folder, start=start))
            )
        self._bar = tqdm(
            total=steps, initial=start, dynamic_ncols=True, disable=None, bar_format=BAR
        )
        self._closing.callback(self._bar.close)
        self._show(start, "compiling the first step")
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        self._closing.callback(jax.monitoring.unregister_event_duration_listener, self._hear)

    def step(self, step: int, metrics: dict[str, float], *, waited: float) -> None:
        """Takes note of a step that is done, and writes every ``config.every`` of them.

        Args:
          step: its number, from 1.
          metrics: host numbers.
          waited: seconds that the loop waited for data since the step before.
        """
        if not self._active:
            return
        now = time.perf_counter()
        self._window.add(metrics, now - self._since, waited, compiled=self._compiled)
        self._since, self._compiled, self._done = now, False, step
        self._bar.update()
        if step % self._config.every == 0 or step == self._steps:
            self._write_window()
        # Here and not in `profile`: only a step that was read is known to be in the trace.
        if self._tracing and step >= self._config.profile_start + self._config.profile_steps:
            self._stop_trace()

    def figures(self, step: int, values: dict[str, float]) -> None:
        """Writes the figures of a validation after ``step`` steps."""
        if not self._active:
            return
        self._write("valid", step, values)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        tqdm.write(f"validation after step {step}: {shown}", file=sys.stderr)

    def picture(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """A picture for TensorBoard; the same name at other steps gives a row of them."""
        if self._active and self._events:
            self._events.picture(step, name, image)

    def settings(self, values: dict[str, Any]) -> None:
        """The run's configuration, as a text of TensorBoard."""
        if self._active and self._events:
            text = json.dumps(values, indent=2, default=str)
            self._events.text(self._done, "settings", f"```\n{text}\n```")

    def profile(self, done: int) -> contextlib.AbstractContextManager:
        """To be called before every step, with the number of those before it.

        Starts jax's profiler after ``config.profile_start`` steps; it ends when ``profile_steps``
        more have been reported to :meth:`step`. Returns a context for the step, which marks it.
        """
        if not self._active or not self._config.profile_start:
            return contextlib.nullcontext()
        if done == self._config.profile_start:
            with self.pause():
                jax.profiler.start_trace(self._path.with_name(PROFILE))
            self._tracing = True
        if not self._tracing:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=done + 1)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Context of what is no step's time: validation, waiting for a checkpoint."""
        before, compiled = time.perf_counter(), self._compiled
        try:
            yield
        finally:
            self._since += time.perf_counter() - before
            self._compiled = compiled

    def close(self) -> None:
        """Writes what is left, the steps since the last line included. Twice is once."""
        if not self._active:
            return
        self._active = False
        with self._closing:
            if self._tracing:
                self._closing.callback(self._stop_trace)
            if self._window.metrics:
                self._write_window()

    def _hear(self, event: str, duration: float, **_: Any) -> None:
        self._compiled |= event == COMPILED

    def _stop_trace(self) -> None:
        self._tracing = False
        with self.pause():
            jax.profiler.stop_trace()

    def _write_window(self) -> None:
        values = self._window.values(self._images, self._peak_rate)
        self._window = Window()
        self._write("train", self._done, values)
        self._show(self._done, summary(values, self._steps - self._done))

    def _write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line of the file, and scalars of the same names."""
        values = {name: _finite(value) for name, value in values.items()}
        line = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        with named_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        if kind != "start" and self._events:
            self._events.scalars(step, kind, values)

    def _show(self, step: int, text: str) -> None:
        """In the bar on a terminal; elsewhere, such as a file, as a line."""
        self._bar.set_postfix_str(text)
        if self._bar.disable:
            print(f"step {step}/{self._steps}: {text}", file=sys.stderr, flush=True)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut_torn_line(path: Path) -> None:
    """What a run that was killed may leave at the end of its log."""
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``log.jsonl`` that hold, in order; a torn last one is left out.

    Raises:
      ValueError: for a line that is none of ours.
    """
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(True), 1):
        if not text.endswith("\n"):
            break
        try:
            line = json.loads(text)
            kind, step = line["kind"], line["step"]
            version = line["schema_version"] if kind == "start" or not lines else SCHEMA_VERSION
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{path}, line {number}: not of a training log: {text[:80]!r}"
            ) from None
        if version != SCHEMA_VERSION:
            raise ValueError(f"{path} has schema_version {version}, not {SCHEMA_VERSION}")
        if kind == "start":
            lines = [earlier for earlier in lines if earlier["step"] <= step]
        lines.append(line)
    return lines
