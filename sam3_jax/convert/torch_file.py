"""Reads ``torch.save`` files without torch and without running anything that they hold.

Such a file is a zip archive: a pickle that describes the tensors, and one uncompressed entry a
storage. The pickle is read by an unpickler that knows a dozen harmless names and refuses all
others; the storages are mapped into memory, so that opening 3.4 GB takes milliseconds.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sam3_jax.convert.errors import ConversionError

STORAGE_DTYPES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "ComplexFloatStorage": np.complex64,
    "ComplexDoubleStorage": np.complex128,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_MAX_PICKLE = 256 * 2**20  # the release's takes 0.2 MB
_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature ... lengths of the name and the extra field


class _StorageType(NamedTuple):
    """A storage class as the pickle names it."""

    dtype: np.dtype


class _Storage(NamedTuple):
    """A run of equal elements in the archive."""

    data: np.ndarray  # 1-d, mapped


class _Damaged(Exception):
    """What the pickle says cannot be: the file is not as torch wrote it."""


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> np.ndarray:
    """What ``torch._utils._rebuild_tensor_v2`` does, on NumPy, staying inside the storage."""
    if not isinstance(storage, _Storage):
        raise _Damaged("a tensor without a storage")
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or any(type(n) is not int or n < 0 for n in numbers):
        raise _Damaged(f"a tensor of shape {shape}, strides {strides}, offset {offset}")
    data = storage.data
    if 0 in shape:
        return np.zeros(shape, data.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if last >= data.size:
        raise _Damaged(f"a tensor of shape {shape} ends at element {last} of {data.size}")
    steps = tuple(step * data.itemsize for step in strides)
    return np.lib.stride_tricks.as_strided(data[offset:], shape, steps, writeable=False)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    """What ``torch._utils._rebuild_parameter`` wraps."""
    return data


# All that a pickle can get hold of, and so all that a hostile one can call.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): _StorageType(np.dtype(t)) for name, t in STORAGE_DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Unpickles dictionaries of tensors and nothing else."""

    def __init__(self, stream: io.BytesIO, where: Path, read: Callable[[str], np.ndarray]):
        super().__init__(stream)
        self._where = where
        self._read_storage = read

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise ConversionError(
                f"{self._where}: refused, because the file asks for {module}.{name}, which a "
                "dictionary of tensors does not need and which could run code. If you trust the "
                "file, load it in PyTorch and save its state dictionary alone: "
                'torch.save({"model": model.state_dict()}, "weights.pt")'
            )
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        tag, kind, key, _, count = pid
        if tag != "storage" or not isinstance(kind, _StorageType):
            raise _Damaged(f"an unknown kind of storage {tag!r}")
        data = self._read_storage(key)
        if data.size < count * kind.dtype.itemsize:
            raise _Damaged(f"storage {key} has {data.size} bytes for {count} of {kind.dtype}")
        return _Storage(data[: count * kind.dtype.itemsize].view(kind.dtype))


def _storage_reader(path: Path, archive: zipfile.ZipFile, prefix: str) -> Callable[[str], Any]:
    """Function from a storage's key to its bytes, mapped from the file."""
    mapped = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
    entries = {info.filename: info for info in archive.infolist()}

    def read(key: str) -> np.ndarray:
        info = entries.get(f"{prefix}data/{key}")
        if info is None:
            raise _Damaged(f"storage {key} is missing")
        if info.compress_type != zipfile.ZIP_STORED:
            raise ConversionError(
                f"{path}: the archive was compressed again after torch.save; unpack it and use the "
                "original file"
            )
        header = mapped[info.header_offset :][: _LOCAL_HEADER.size].tobytes()
        if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
            raise _Damaged(f"storage {key} has no header")
        _, name, extra = _LOCAL_HEADER.unpack(header)
        start = info.header_offset + _LOCAL_HEADER.size + name + extra
        if start + info.file_size > mapped.size:
            raise _Damaged(f"storage {key} is cut off")
        return mapped[start : start + info.file_size]

    return read


def _open_archive(path: Path) -> tuple[zipfile.ZipFile, str]:
    """The archive and the folder that everything in it lies under."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ConversionError(
            f"{path}: cut off or damaged ({error}; {path.stat().st_size} bytes); download it again"
        ) from error
    names = archive.namelist()
    pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
    if any("/code/" in name or name.endswith("constants.pkl") for name in names):
        raise ConversionError(
            f"{path}: a TorchScript program, not a checkpoint; use the original sam3.pt"
        )
    if len(pickles) != 1:
        raise ConversionError(f"{path}: a zip archive, but not one that torch.save writes")
    return archive, pickles[0].removesuffix("data.pkl")


def _unpickle(path: Path, archive: zipfile.ZipFile, prefix: str) -> Any:
    info = archive.getinfo(f"{prefix}data.pkl")
    if info.file_size > _MAX_PICKLE:
        raise ConversionError(f"{path}: its pickle of {info.file_size} bytes is too large")
    order = f"{prefix}byteorder"
    if order in archive.namelist() and archive.open(order).read(6) != b"little":
        raise ConversionError(f"{path}: written on a big-endian machine; save it again on another")
    try:
        stream = io.BytesIO(archive.read(info))
        return _Unpickler(stream, path, _storage_reader(path, archive, prefix)).load()
    except ConversionError:
        raise
    except Exception as error:  # a damaged pickle can make the unpickler raise anything
        reason = error if isinstance(error, _Damaged) else f"{type(error).__name__}: {error}"
        raise ConversionError(f"{path}: damaged, download it again ({reason})") from error


def is_legacy(head: bytes) -> bool:
    """Whether a file that starts so is of ``torch.save`` before 1.6, or another bare pickle."""
    return head.startswith(_LEGACY_MAGIC) or (
        head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"
    )


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a ``torch.save`` file by name, as read-only views of the file.

    Accepts a state dictionary, or one under ``"model"`` beside other plain data.

    Raises:
      ConversionError: when the file is damaged, is another container, or asks for anything but
        tensors.
    """
    archive, prefix = _open_archive(path)
    with archive:
        state = _unpickle(path, archive, prefix)
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not state:
        raise ConversionError(f"{path}: holds no dictionary of tensors ({type(state).__name__})")
    others = [name for name, value in state.items() if not isinstance(value, np.ndarray)]
    if others:
        listed = ", ".join(repr(name) for name in others[:5])
        raise ConversionError(
            f"{path}: {len(others)} entries are no tensors ({listed}); save the state dictionary "
            "alone, or under 'model'"
        )
    return {str(name): array for name, array in state.items()}
