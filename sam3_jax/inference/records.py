"""Results as they come: an append-only file for each process, merged into one COCO file at the end.

``results-00000-of-00002.jsonl`` is the part of process 0 of 2. Its first line describes the run,
``{"schema_version": 1, "run": {...}}``; every further line is one picture:

    {"key": ..., "index": 0, "file_name": ..., "status": "ok", "error": null, "width": 640,
     "height": 480, "seconds": 0.21, "phrases": ["cat"], "outputs": ["a_overlay.png"],
     "annotations": [{"phrase": "cat", "segmentation": {"size": [480, 640], "counts": ...},
                      "bbox": [x, y, w, h], "area": 1234, "score": 0.91}]}

Nothing that was written is ever changed, so a run may be killed at any time: what it leaves is at
most a torn last line, which the next run cuts off. A picture may have several records: in a part
the last one counts, between parts a good one before a failed one.

``merge.py`` makes ``results.json`` of the parts.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from sam3_jax.inference.files import UsageError, named_errors

SCHEMA_VERSION = 1
PARTS = "results-*-of-*.jsonl"
MERGED = "results.json"
SYNC_SECONDS = 5.0  # so much work is lost at most when the machine loses its power
BLOCK = 1 << 16  # bytes
REMEDY = "use --overwrite to start again, or another output folder"


def part_path(folder: Path, process: int, processes: int) -> Path:
    """The file of process ``process`` (from 0) of ``processes``."""
    return folder / f"results-{process:05d}-of-{processes:05d}.jsonl"


def ok_record(
    key: str,
    file_name: str,
    *,
    index: int,
    size: tuple[int, int],
    seconds: float,
    phrases: Sequence[str],
    annotations: Sequence[dict[str, Any]],
    outputs: Sequence[str],
) -> dict[str, Any]:
    """The record of a picture that was processed.

    Args:
      key: of the job, see ``jobs.py``.
      file_name: as the user named it.
      index: of the job in the whole work list; results are merged in this order.
      size: (height, width) in pixels.
      seconds: that the picture took.
      phrases: what was searched for, found or not.
      annotations: instances, each of ``placed.annotation``.
      outputs: other files of this picture, relative to the results.
    """
    return {
        "key": key,
        "index": index,
        "file_name": file_name,
        "status": "ok",
        "error": None,
        "width": size[1],
        "height": size[0],
        "seconds": round(seconds, 3),
        "phrases": list(phrases),
        "outputs": list(outputs),
        "annotations": list(annotations),
    }


def error_record(key: str, file_name: str, error: str, *, index: int) -> dict[str, Any]:
    """The record of a picture, or of a job, that failed; a restart tries it again."""
    names = {"key": key, "index": index, "file_name": file_name, "status": "error", "error": error}
    return {**names, "width": None, "height": None, "phrases": [], "outputs": [], "annotations": []}


def discard(folder: Path) -> None:
    """Deletes the results in a folder, parts and merged, for a run that starts again."""
    for path in [*folder.glob(PARTS), folder / MERGED]:
        path.unlink(missing_ok=True)


class RecordWriter:
    """Appends records to a part; to be used by one process and one thread.

    Args:
      path: of the part, see :func:`part_path`.
      run: the settings that results depend on, the same in all processes: JSON values.

    Raises:
      UsageError: when results with other settings are in the folder.
      OSError: when the file cannot be opened or written.
    """

    def __init__(self, path: Path, run: dict[str, Any]):
        run = json.loads(json.dumps(run))  # tuples become lists, as they come back from the file
        self._path = path
        for part in sorted({*path.parent.glob(PARTS), path}):
            check_run(part, run)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        self._file = os.open(path, flags, 0o644)
        try:
            with named_errors(path):
                _cut_torn_line(self._file)
            self._synced = time.monotonic()
            if not os.fstat(self._file).st_size:
                self.write({"schema_version": SCHEMA_VERSION, "run": run})
        except BaseException:
            os.close(self._file)
            raise

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record; on return it survives the end of this process.

        Raises:
          OSError: with the file's name, for example on a full disk; the record then is not there.
        """
        line = memoryview(json.dumps(record, allow_nan=False).encode() + b"\n")
        with named_errors(self._path):
            size = os.fstat(self._file).st_size
            try:
                while line:  # one write as a rule; a nearly full disk takes a part of it
                    line = line[os.write(self._file, line) :]
            except OSError:
                os.ftruncate(self._file, size)
                raise
            if time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(self._file)
                self._synced = time.monotonic()

    def close(self) -> None:
        """Brings everything to the disk."""
        with named_errors(self._path):
            try:
                os.fsync(self._file)
            finally:
                os.close(self._file)

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_run(part: Path) -> dict[str, Any] | None:
    """The run that a part belongs to; None when its first line is not complete or not there.

    Raises:
      UsageError: when this is no part of ours.
    """
    try:
        with part.open("rb") as file:
            line = file.readline()
    except FileNotFoundError:
        return None
    if not line.endswith(b"\n"):
        return None
    try:
        header = json.loads(line)
        version, run = header["schema_version"], header["run"]
    except (ValueError, TypeError, KeyError):
        raise UsageError(f"{part} does not start as results do: {REMEDY}") from None
    if version != SCHEMA_VERSION:
        raise UsageError(f"{part} has schema_version {version}, not {SCHEMA_VERSION}: {REMEDY}")
    return run


def check_run(part: Path, run: dict[str, Any]) -> None:
    """Raises a UsageError that names the differences unless ``part`` is of this run, or empty."""
    stored = read_run(part)
    if stored is None or stored == run:
        return
    before, now = _flat(stored), _flat(run)
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    changes = (f"{name} was {before.get(name)}, is {now.get(name)}" for name in names)
    raise UsageError(f"{part} has results with other settings ({'; '.join(changes)}): {REMEDY}")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings with dotted names -> JSON."""
    flat = {}
    for name, value in values.items():
        nested = isinstance(value, dict) and value
        flat |= _flat(value, f"{prefix}{name}.") if nested else {prefix + name: json.dumps(value)}
    return flat


def _cut_torn_line(file: int) -> None:
    """Cuts what comes after the last end of a line."""
    end = os.fstat(file).st_size
    size = end
    while end > 0:
        start = max(end - BLOCK, 0)
        os.lseek(file, start, os.SEEK_SET)
        newline = os.read(file, end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(file, end)
