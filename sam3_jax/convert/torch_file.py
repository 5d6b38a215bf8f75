"""Reads tensors out of files of ``torch.save`` without torch, and without running their pickle.

Such a file is a zip archive: ``NAME/data.pkl`` describes the objects, ``NAME/data/KEY`` are the
tensors' bytes, stored uncompressed. The pickle is read by an unpickler that knows a handful of
names and refuses every other one; tensors are read-only views of the memory-mapped file.
"""

from __future__ import annotations

import collections
import math
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np


class FileError(Exception):
    """A file that cannot be read as weights; the message says what to do."""


_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "ComplexFloatStorage": np.complex64,
}
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip entry: the lengths of its name and extra field


class _StorageType(NamedTuple):
    dtype: np.dtype


class _Storage(NamedTuple):
    values: np.ndarray


class _Refused(Exception):
    """The pickle asks for something that is not on the list."""


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_unused: Any) -> np.ndarray:
    """``torch._utils._rebuild_tensor_v2`` on numpy; checks that the view stays inside."""
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without storage")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"offset {offset}, size {size} and strides {stride} make no tensor")
    values = storage.values
    if math.prod(size) == 0:
        return np.empty(size, values.dtype)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if last >= values.size:
        raise ValueError(f"a tensor reaches to element {last} of {values.size}")
    steps = [s * values.itemsize for s in stride]
    return np.lib.stride_tricks.as_strided(values[offset:], size, steps, writeable=False)


def _rebuild_parameter(data: np.ndarray, *_unused: Any) -> np.ndarray:
    return data


_ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): tuple,
    **{("torch", name): _StorageType(np.dtype(dtype)) for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Resolves the names in ``_ALLOWED`` to the functions above, and nothing else."""

    def __init__(self, file: Any, archive: _Archive):
        super().__init__(file, encoding="utf-8")
        self._archive = archive
        self._storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _location, count = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise ValueError(f"unknown reference {kind!r}")
        if key not in self._storages:
            self._storages[key] = _Storage(self._archive.read(key, storage_type.dtype, count))
        return self._storages[key]


class _Archive:
    """The zip file, its pickle and its memory-mapped entries."""

    def __init__(self, path: Path):
        self._path = path
        with zipfile.ZipFile(path) as file:
            self._entries = {info.filename: info for info in file.infolist()}
            pickles = [name for name in self._entries if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise FileError(
                    f"{path} is a zip archive, but not one of torch.save (no data.pkl in it); "
                    "give sam3.pt or model.safetensors"
                )
            self._folder = pickles[0].removesuffix("data.pkl")
            order = self._folder + "byteorder"
            if order in self._entries and file.read(order).strip() != b"little":
                raise FileError(f"{path} was written on a big-endian machine; save it again")
        self._map = np.memmap(path, np.uint8, "r")

    def pickle(self) -> bytes:
        return self._bytes("data.pkl").tobytes()

    def read(self, key: str, dtype: np.dtype, count: int) -> np.ndarray:
        data = self._bytes(f"data/{key}")
        if len(data) != count * dtype.itemsize:
            raise ValueError(f"data/{key} has {len(data)} bytes for {count} numbers of {dtype}")
        return data.view(dtype)

    def _bytes(self, name: str) -> np.ndarray:
        info = self._entries.get(self._folder + name)
        if info is None:
            raise ValueError(f"{name} is not in the archive")
        if info.compress_type != zipfile.ZIP_STORED:
            raise FileError(
                f"{self._path}: the entry {name} is compressed; torch.save does not do that. "
                "Load the file with torch and save it again"
            )
        header = self._map[info.header_offset : info.header_offset + 30].tobytes()
        if len(header) != 30 or header[:4] != b"PK\x03\x04":
            raise ValueError(f"{name} has no header at {info.header_offset}")
        start = info.header_offset + 30 + sum(_LOCAL_HEADER.unpack(header))
        data = self._map[start : start + info.file_size]
        if len(data) != info.file_size:
            raise ValueError(f"{name} ends early")
        return data


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """Tensors by name, as read-only views of the file; from under ``"model"`` if that exists.

    Raises:
      FileError: not such a file, damaged, or with more than tensors in its pickle.
    """
    import io

    _check_container(path)
    damaged = f"{path} is damaged or was not downloaded to its end; get it again"
    try:
        archive = _Archive(path)
        content = _Unpickler(io.BytesIO(archive.pickle()), archive).load()
    except _Refused as refused:
        raise FileError(
            f"{path} is refused: its pickle asks for {refused}, which weights do not need and "
            "which could run code. Get the file from a source that you trust, or load it there "
            "and save only its tensors"
        ) from None
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # a pickle can be wrong in any way
        raise FileError(f"{damaged} ({error})") from error
    return _state_dict(path, content)


def _check_container(path: Path) -> None:
    """Says what a file is that is not a zip archive."""
    with path.open("rb") as file:
        start = file.read(16)
    if zipfile.is_zipfile(path):
        return
    if start.startswith(b"PK\x03\x04"):
        raise FileError(f"{path} is damaged or was not downloaded to its end; get it again")
    if start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04"):
        raise FileError(
            f"{path} is in torch's old format (before 1.6), which this does not read; load it "
            "with torch.load(..., weights_only=True) and torch.save it again"
        )
    raise FileError(
        f"{path} is neither a file of torch.save nor safetensors (it starts with {start[:8]!r}); "
        "give sam3.pt, model.safetensors, a folder of Hugging Face, or a hub id"
    )


def _state_dict(path: Path, content: Any) -> dict[str, np.ndarray]:
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict):
        raise FileError(f"{path} holds a {type(content).__name__}, not tensors by name")
    tensors = {n: t for n, t in content.items() if isinstance(t, np.ndarray)}
    if not tensors:
        keys = ", ".join(map(repr, list(content)[:5])) or "nothing"
        raise FileError(f"{path} holds no tensors, only {keys}; give sam3.pt")
    others = [n for n in content if n not in tensors]
    if others or not all(isinstance(n, str) for n in tensors):
        names = ", ".join(map(repr, others[:5]))
        raise FileError(f"{path} mixes tensors with other things ({names}); save only the tensors")
    return tensors
