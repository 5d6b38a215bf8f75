"""Files that TensorBoard shows, written without TensorFlow and without TensorBoard."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from sam3_jax.inference.files import named_errors


class Events:
    """One file of events, written at once by the thread that calls.

    tensorboardX's ``SummaryWriter`` is not used: it writes from a thread, through a bounded queue,
    and where the disk is full the thread ends and the training loop waits for ever.
    """

    def __init__(self, folder: Path, *, start: int):
        """A new file in ``folder``; TensorBoard hides older files' events after step ``start``.

        Raises:
          OSError: when the file cannot be written, here and in all methods.
        """
        # Here, because it imports torch where torch is installed.
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        self._event, self._summary, self._folder = event_pb2.Event, summary, folder
        with named_errors(folder):
            self._writer = event_file_writer.EventsWriter(
                str(folder / "events"), f".{os.getpid()}.{start}"
            )
        log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(self._event(step=start + 1, session_log=log))

    def scalars(self, step: int, group: str, values: dict[str, float | int | None]) -> None:
        """Numbers under ``group/name``; None is left out."""
        every = self._event(step=step)
        for name, value in values.items():
            if value is not None:
                every.summary.MergeFrom(self._summary.scalar(f"{group}/{name}", value))
        self._write(every)

    def picture(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        picture = self._summary.image(name, image, dataformats="HWC")
        self._write(self._event(step=step, summary=picture))

    def text(self, step: int, name: str, text: str) -> None:
        """``text`` is Markdown."""
        self._write(self._event(step=step, summary=self._summary.text(name, text)))

    def close(self) -> None:
        with named_errors(self._folder):
            self._writer.close()

    def _write(self, event: object) -> None:
        event.wall_time = time.time()
        with named_errors(self._folder):
            self._writer.write_event(event)
            self._writer.flush()
