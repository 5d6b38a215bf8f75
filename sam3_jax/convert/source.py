"""Finds out what ``--input`` is and opens it: a torch file, safetensors, a folder, a hub id."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sam3_jax import checkpoint
from sam3_jax.convert.errors import ConversionError
from sam3_jax.convert.safetensors_file import (
    INDEX,
    looks_like_safetensors,
    read_safetensors,
    read_sharded,
)
from sam3_jax.convert.torch_file import is_legacy, read_torch

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["config.json", "*.safetensors", INDEX]


class Source(NamedTuple):
    """Opened weights: views of mapped files, nothing is read yet."""

    name: str  # as the user wrote it
    files: tuple[Path, ...]  # what the tensors lie in
    tensors: dict[str, np.ndarray]
    hf_config: tuple[Path, Any] | None  # config.json beside safetensors, parsed

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(file.stat().st_size for file in self.files)


def open_source(name: str) -> Source:
    """Opens a path or, where there is none, an id of the Hugging Face hub.

    Raises:
      ConversionError: when nothing usable is there.
    """
    path = Path(name)
    try:
        if not path.exists():
            if not _HUB_ID.fullmatch(name) or path.suffix in (".pt", ".pth", ".safetensors"):
                raise ConversionError(f"{name}: no such file or folder")
            path = _download(name)
        return _open_folder(name, path) if path.is_dir() else _open_file(name, path)
    except OSError as error:
        raise ConversionError(f"{name}: cannot be read ({error})") from error


def _download(name: str) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise ConversionError(
            f"{name}: no such file; to download it as an id of the Hugging Face hub, "
            "pip install 'sam3_jax[convert]'"
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ConversionError(
            f"{name}: no such file, and as an id of the Hugging Face hub it cannot be downloaded "
            f"({str(error).strip().splitlines()[0]}). The weights are gated: ask for access on "
            f"https://huggingface.co/{name}, then `hf auth login`; or download them elsewhere and "
            "give the folder"
        ) from error


def _open_folder(name: str, folder: Path) -> Source:
    if checkpoint.is_checkpoint(folder):
        raise ConversionError(
            f"{folder}: is converted already; use it as it is, or add --to-torch or --to-hf LAYOUT "
            "to convert it back"
        )
    if (folder / INDEX).is_file():
        return _open_file(name, folder / INDEX)
    found = sorted(folder.glob("*.safetensors"))
    if (folder / "model.safetensors") in found:
        found = [folder / "model.safetensors"]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ConversionError(f"{folder}: holds {names} and no {INDEX}; give one of them")
    if found:
        return _open_file(name, found[0])
    if (folder / "sam3.pt").is_file():
        return _open_file(name, folder / "sam3.pt")
    if list(folder.glob("*.bin")):
        raise ConversionError(
            f"{folder}: *.bin files are pickles, which are not read; save the model again with "
            "model.save_pretrained(folder), which writes safetensors"
        )
    raise ConversionError(f"{folder}: holds neither model.safetensors nor sam3.pt")


def _open_file(name: str, path: Path) -> Source:
    if path.name.endswith(".index.json"):
        tensors, files = read_sharded(path)
        return Source(name, tuple(files), tensors, _hf_config(path.parent))
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"PK"):
        return Source(name, (path,), read_torch(path), None)
    if looks_like_safetensors(head, path.stat().st_size):
        return Source(name, (path,), read_safetensors(path), _hf_config(path.parent))
    raise ConversionError(f"{path}: {_describe(head, path)}")


def _describe(head: bytes, path: Path) -> str:
    """What a file is that is neither a torch archive nor safetensors, and what to do."""
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer instead of the weights; run `git lfs pull` in its folder"
    if is_legacy(head):
        return (
            "a bare pickle (torch.save before 1.6), which is not read; load it in PyTorch and save "
            'it again: torch.save(torch.load("old.pt"), "new.pt")'
        )
    if head.lstrip()[:1] == b"<":
        return "a web page instead of the weights; download the file again, signed in"
    if path.suffix == ".safetensors":
        return f"cut off or not a safetensors file ({path.stat().st_size} bytes); download it again"
    return (
        f"not a file of torch.save or safetensors (it starts with {head[:8]!r}); give sam3.pt, "
        "model.safetensors, or the folder that holds it"
    )


def _hf_config(folder: Path) -> tuple[Path, Any] | None:
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        return file, json.loads(file.read_text())
    except ValueError as error:
        raise ConversionError(f"{file}: not JSON ({error}); download it again") from error


def hash_files(source: Source, progress: Callable[[int], object]) -> list[dict[str, Any]]:
    """Name, size and SHA-256 of every file; ``progress`` hears of the bytes read."""
    described = []
    for path in source.files:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
                progress(len(block))
        size = path.stat().st_size
        described.append({"name": path.name, "bytes": size, "sha256": digest.hexdigest()})
    return described
