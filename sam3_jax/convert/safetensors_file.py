"""Reads safetensors files: one file, shards with an index, a Hugging Face folder.

The format is a length (8 bytes), a JSON header of that length and the tensors' bytes. Tensors are
read-only views of the memory-mapped file.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np

from sam3_jax.convert.torch_file import FileError

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "C64": np.complex64,
}
_MAX_HEADER = 100_000_000  # the format's own limit
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def is_safetensors(path: Path) -> bool:
    """Whether a file's first bytes, or its name, say that it is one."""
    with path.open("rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or start[8:9] == b"{"


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Tensors of one file by name.

    Raises:
      FileError: the header or an offset is wrong, or the file is too short.
    """
    try:
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read: {error}") from error
    damaged = f"{path} is damaged or was not downloaded to its end; get it again"
    length = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or length > min(_MAX_HEADER, len(data) - 8):
        raise FileError(f"{damaged} (its header ends behind the file)")
    try:
        header = json.loads(data[8 : 8 + length].tobytes())
        header.pop("__metadata__", None)
        body = data[8 + length :]
        return {name: _tensor(name, entry, body) for name, entry in header.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FileError(f"{damaged} ({error})") from error


def _tensor(name: str, entry: dict, body: np.ndarray) -> np.ndarray:
    kind, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if kind not in _DTYPES:
        raise ValueError(f"{name} has the unknown dtype {kind}")
    dtype = np.dtype(_DTYPES[kind])
    if any(type(n) is not int or n < 0 for n in (*shape, start, end)):
        raise ValueError(f"{name} has the shape {shape} at {start} to {end}")
    if end - start != math.prod(shape) * dtype.itemsize or end > len(body):
        raise ValueError(f"{name} reaches from {start} to {end} of {len(body)} bytes")
    return body[start:end].view(dtype).reshape(shape)


def folder_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder.

    Raises:
      FileError: there are none, or the index names one that is missing.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        raise FileError(f"{folder} has neither {SINGLE} nor {INDEX}; download the whole model")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        unsafe = [name for name in names if Path(name).name != name]
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise FileError(f"{index} is damaged ({error}); get it again") from error
    if unsafe:
        raise FileError(f"{index} names a file outside its folder: {unsafe[0]}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names; download them")
    return [folder / name for name in names]


def read_files(files: list[Path]) -> dict[str, np.ndarray]:
    """Tensors of several files together."""
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        found = read_safetensors(file)
        twice = tensors.keys() & found.keys()
        if twice:
            raise FileError(f"{file} repeats {min(twice)} of another shard; get the files again")
        tensors.update(found)
    return tensors
