"""Writes ``torch.save`` files without torch: the counterpart of ``torch_file.py``.

The pickle is put together opcode by opcode, because a pickler would have to import what it names.
``torch.load(path, weights_only=True)`` reads the result.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sam3_jax.convert.torch_file import STORAGE_DTYPES

_STORAGES = {np.dtype(dtype): name for name, dtype in STORAGE_DTYPES.items()}
_FOLDER = "archive"
_ALIGNMENT = 64  # of storages in the file, as torch has it, so that they can be mapped
_PADDING = struct.Struct("<2sH")  # torch's own extra field: b"FB" and its length


class _Spec(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


def _integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _tensor(spec: _Spec, key: int) -> bytes:
    """Opcodes that rebuild one contiguous tensor from the storage ``key``."""
    strides = [1]
    for size in reversed(spec.shape[1:]):
        strides.insert(0, strides[0] * size)
    count = int(np.prod(spec.shape))
    kind = _global("torch", _STORAGES[spec.dtype])
    storage = _tuple(_text("storage"), kind, _text(str(key)), _text("cpu"), _integer(count)) + b"Q"
    no_hooks = _global("collections", "OrderedDict") + b")R"
    arguments = _tuple(
        storage,
        _integer(0),
        _tuple(*map(_integer, spec.shape)),
        _tuple(*map(_integer, strides[: len(spec.shape)])),
        b"\x89",  # requires_grad=False
        no_hooks,
    )
    return _global("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def _pickle(specs: list[_Spec]) -> bytes:
    """A dictionary of all tensors, protocol 2."""
    items = b"".join(_text(spec.name) + _tensor(spec, key) for key, spec in enumerate(specs))
    return b"\x80\x02}(" + items + b"u."


def _entry(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    """Stores an entry whose data begins at a multiple of 64 bytes."""
    info = zipfile.ZipInfo(f"{_FOLDER}/{name}")
    begin = archive.fp.tell() + zipfile.sizeFileHeader + len(info.filename) + _PADDING.size
    padding = -begin % _ALIGNMENT
    info.extra = _PADDING.pack(b"FB", padding) + b"\0" * padding
    archive.writestr(info, data, compress_type=zipfile.ZIP_STORED)


def write_torch(
    path: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    progress: Callable[[int], object],
) -> None:
    """Writes (name, array) pairs one by one; ``progress`` hears of the bytes of each."""
    specs: list[_Spec] = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in tensors:
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            _entry(archive, f"data/{len(specs)}", data)
            specs.append(_Spec(name, array.shape, array.dtype))
            progress(array.nbytes)
        _entry(archive, "data.pkl", _pickle(specs))
        _entry(archive, "byteorder", b"little")
        _entry(archive, "version", b"3\n")
