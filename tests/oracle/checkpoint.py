"""Writes checkpoints in the release's container, names, shapes and dtypes, with seeded values."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import torch

from .weights import fill

_LIST = Path(__file__).parent.parent / "data" / "sam3_pt_tensors.txt.gz"


def sam3_pt_tensors() -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of all 1465 tensors of the released ``sam3.pt``, in its order."""
    tensors = {}
    for line in gzip.decompress(_LIST.read_bytes()).decode().splitlines():
        name, shape, dtype = line.split()
        tensors[name] = (tuple(int(n) for n in shape.split("x")), getattr(torch, dtype))
    return tensors


def _tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    if dtype.is_complex:
        # RoPE tables. Released ones may be stale, so these are deliberately wrong: unit
        # modulus, random phase. Whoever uses them instead of computing them will notice.
        phase = torch.empty(shape)
        fill(phase, name, name, seed)
        return torch.polar(torch.ones(shape), phase * math.pi)
    tensor = torch.empty(shape, dtype=dtype)
    fill(tensor, name, name, seed)
    return tensor


def fake_sam3_pt(
    path: str | Path,
    seed: int,
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] | None = None,
    *,
    wrapped: bool = False,
) -> None:
    """Saves a checkpoint like ``sam3.pt``: 3.4 GB in a few seconds.

    Args:
      path: file to write.
      seed: each tensor depends on it and on the tensor's name alone.
      tensors: names, shapes and dtypes; default all of the release.
      wrapped: put the dictionary under ``"model"``.
    """
    wanted = sam3_pt_tensors() if tensors is None else tensors
    state = {name: _tensor(name, *spec, seed) for name, spec in wanted.items()}
    torch.save({"model": state} if wrapped else state, path)
