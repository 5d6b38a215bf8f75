"""TFDS's shuffling of large data sets, without TensorFlow.

While it writes, TFDS shuffles up to 1 GB of records in memory; more go through temporary files,
which it opens with TensorFlow. Here they are plain files.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from unittest import mock

from tensorflow_datasets.core import shuffle

_KEY, _LENGTH = 16, 8  # bytes of a hashed key, of a length


class Bucket:
    """A temporary file of keyed records: what ``tensorflow_datasets.core.shuffle`` expects."""

    def __init__(self, path: os.PathLike):
        self._path = Path(path)
        self._file: BinaryIO | None = None
        self._records = 0
        self.size = 0  # bytes of the records

    def __len__(self) -> int:
        return self._records

    def add(self, key: int, data: bytes) -> None:
        """Appends a record."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("wb")
        self._file.write(key.to_bytes(_KEY, "little") + len(data).to_bytes(_LENGTH, "little"))
        self._file.write(data)
        self._records += 1
        self.size += len(data)

    def flush(self) -> None:
        """Ends writing."""
        if self._file:
            self._file.close()

    def read_values(self) -> Iterator[tuple[int, bytes]]:
        """All records, in the order of writing."""
        self.flush()
        if not self._path.exists():  # nothing was added
            return
        with self._path.open("rb") as file:
            while head := file.read(_KEY + _LENGTH):
                length = int.from_bytes(head[_KEY:], "little")
                yield int.from_bytes(head[:_KEY], "little"), file.read(length)

    def del_file(self) -> None:
        """Removes the file."""
        self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def plain_files() -> Iterator[None]:
    """Within it TFDS writes data sets of any size without TensorFlow."""
    with mock.patch.object(shuffle, "_Bucket", Bucket):
        yield
