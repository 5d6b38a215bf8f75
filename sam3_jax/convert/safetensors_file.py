"""Reads and writes safetensors files, with bfloat16 and without copying.

Format (https://huggingface.co/docs/safetensors): eight bytes with the length of the header, a JSON
header with type, shape and place of every tensor, then the bytes of the tensors.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sam3_jax.convert.errors import ConversionError, raise_problems

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "C64": np.complex64,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100 * 10**6  # the format's own limit
INDEX = "model.safetensors.index.json"


def looks_like_safetensors(head: bytes, size: int) -> bool:
    """Whether a file of ``size`` bytes that starts so (nine bytes or more) can be one."""
    return head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= size - 8


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header and where the data begins."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(size - 8, _MAX_HEADER):
            raise ConversionError(
                f"{path}: cut off or not a safetensors file ({size} bytes); download it again"
            )
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ConversionError(f"{path}: its header is damaged ({error})") from error
    if not isinstance(header, dict):
        raise ConversionError(f"{path}: its header is damaged (not an object)")
    header.pop("__metadata__", None)
    return header, 8 + length


def _view(data: np.ndarray, entry: Any) -> np.ndarray:
    """One tensor of the mapped data. Raises KeyError, TypeError or ValueError on a bad entry."""
    dtype = np.dtype(DTYPES[entry["dtype"]])
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if any(type(n) is not int or n < 0 for n in (*shape, start, end)):
        raise ValueError(f"shape {shape} at {start} to {end}")
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"shape {shape} does not take the bytes {start} to {end}")
    if end > data.size:
        raise ValueError(f"ends at byte {end} of {data.size}, the file is cut off")
    return data[start:end].view(dtype).reshape(shape)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Tensors of one file by name, as read-only views of it.

    Raises:
      ConversionError: when the file is damaged.
    """
    header, begin = _read_header(path)
    if not header:
        raise ConversionError(f"{path}: holds no tensors")
    data = np.memmap(path, np.uint8, mode="r").view(np.ndarray)[begin:]
    tensors, problems = {}, []
    for name, entry in header.items():
        try:
            tensors[name] = _view(data, entry)
        except (KeyError, TypeError, ValueError) as error:
            problems.append(f"{name}: {type(error).__name__} {error}")
    raise_problems(f"{path} is damaged, download it again", problems)
    return tensors


def read_sharded(index: Path) -> tuple[dict[str, np.ndarray], list[Path]]:
    """Tensors of all files that an index names, and the files.

    Raises:
      ConversionError: when the index or a file is damaged or missing.
    """
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        places = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConversionError(f"{index}: not an index of safetensors files ({error!r})") from error
    names = sorted(set(places.values()))
    # Names alone: an index must not point outside of its folder.
    problems = [f"{name} lies in another folder" for name in names if Path(name).name != name]
    files = [index.parent / name for name in names]
    if not problems:
        problems = [f"{file.name} is missing beside it" for file in files if not file.is_file()]
    raise_problems(str(index), problems)
    shards = {file.name: read_safetensors(file) for file in files}
    absent = [
        f"{name} should be in {file} and is not"
        for name, file in places.items()
        if name not in shards[file]
    ]
    extra = [
        f"{name} is in {file} and not in the index"
        for file, tensors in shards.items()
        for name in tensors
        if places.get(name) != file
    ]
    raise_problems(str(index), [*absent, *extra])
    return {name: shards[file][name] for name, file in places.items()}, files


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], progress: Callable[[int], object]
) -> None:
    """Writes one file; ``progress`` hears of the bytes as they are written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [place, place + array.nbytes],
        }
        place += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
            progress(array.nbytes)
