"""Which pictures a command works on, and what their overlays are called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
OVERLAY_SUFFIX = "_overlay.png"


class UsageError(Exception):
    """What was asked for cannot be started."""


def expand_inputs(inputs: Sequence[Path]) -> list[Path]:
    """Files as they are, folders as the pictures in them by name, each once; no overlays of ours.

    Raises:
      UsageError: on a folder without pictures.
    """
    files: dict[Path, None] = {}
    for path in inputs:
        if path.is_dir():
            pictures = (p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            found = sorted(p for p in pictures if not p.name.endswith(OVERLAY_SUFFIX))
            if not found:
                kinds = " ".join(sorted(SUFFIXES))
                raise UsageError(f"no pictures in the folder {path} (looked for {kinds})")
            files.update(dict.fromkeys(found))
        else:
            files[path] = None
    return list(files)


def overlay_names(files: Sequence[Path]) -> Iterator[str]:
    """``NAME_overlay.png`` for every file; a number tells files of the same name apart."""
    taken = set()
    for file in files:
        name, number = f"{file.stem}{OVERLAY_SUFFIX}", 1
        while name.lower() in taken:  # file systems may not know upper from lower case
            number += 1
            name = f"{file.stem}_{number}{OVERLAY_SUFFIX}"
        taken.add(name.lower())
        yield name
