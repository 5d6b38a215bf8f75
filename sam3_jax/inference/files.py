"""Which pictures and videos a command works on, how outputs are called, how files are replaced."""

from __future__ import annotations

import collections
import contextlib
import glob
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

SUFFIXES = frozenset((".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
VIDEO_SUFFIXES = frozenset(
    ".3gp .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .ogv .webm .wmv".split()
)
OVERLAY_SUFFIX = "_overlay.png"
VIDEO_OVERLAY_SUFFIX, SHEET_SUFFIX = "_overlay.mp4", "_sheet.jpg"
OUTPUT_SUFFIXES = (OVERLAY_SUFFIX, VIDEO_OVERLAY_SUFFIX, SHEET_SUFFIX)
OUTPUT_FOLDERS = ("_masks", "_semantic")  # ends of the names of folders that we write
NAME_BYTES = 120  # of an output's base name; file systems take 255, suffixes come after it


class UsageError(Exception):
    """What was asked for cannot be started."""


def expand_inputs(
    inputs: Sequence[Path], *, recursive: bool = False, as_videos: bool = False
) -> list[Path]:
    """Files as they are, folders as what is in them by name, each once; no outputs of ours.

    In a folder are pictures and video files. Patterns that no shell has expanded are expanded
    here: ``*``, ``?``, ``[ab]``, and ``**`` for any number of folders. They give pictures and
    videos only, unless they end in a suffix (``*.jp2``).

    Args:
      inputs: files, folders and patterns. A name that exists is not a pattern.
      recursive: folders with the folders in them.
      as_videos: a folder with pictures is itself one video's frames and is given as such; of
        another one, and with ``recursive``, so are the folders in it that have pictures.

    Raises:
      UsageError: on a folder or a pattern without any, and on an unreadable folder.
    """
    files: dict[Path, None] = {}
    for path in inputs:
        if os.path.isdir(path):
            found = _in_folder(path, recursive=recursive, as_videos=as_videos)
            if not found:
                kinds = " ".join(sorted(SUFFIXES | VIDEO_SUFFIXES))
                raise UsageError(f"no pictures or videos in the folder {path} (looked for {kinds})")
        elif glob.has_magic(str(path)) and not os.path.lexists(path):
            found = _matches(path, recursive=recursive, as_videos=as_videos)
            if not found:
                raise UsageError(
                    f"no picture or video matches {path}: check the folder and the pattern"
                )
        else:
            found = [path]
        files.update(dict.fromkeys(found))
    return list(files)


def _in_folder(folder: Path, *, recursive: bool, as_videos: bool) -> list[Path]:
    """Pictures and videos in a folder by name."""
    pictures, videos = _listed(folder, recursive=recursive)
    if not as_videos:
        return sorted([*pictures, *videos])
    folders = {picture.parent for picture in pictures}
    if not (pictures or videos):
        below = [p for p in folder.iterdir() if p.is_dir() and _is_input(p, folder)]
        folders = {p for p in below if _listed(p, recursive=False)[0]}
    return sorted([*folders, *videos])


def _listed(folder: Path, *, recursive: bool) -> tuple[list[Path], list[Path]]:
    """Pictures, and video files."""
    try:
        inside = list(folder.rglob("*") if recursive else folder.iterdir())
    except OSError as error:
        raise UsageError(f"cannot look into the folder {folder}: {error.strerror}") from error
    ours = [p for p in inside if _is_input(p, folder)]
    kinds = (SUFFIXES, VIDEO_SUFFIXES)
    pictures, videos = ([p for p in ours if p.suffix.lower() in kind] for kind in kinds)
    return pictures, videos


def _is_input(path: Path, top: Path) -> bool:
    """Neither hidden nor an output of ours; ``top`` itself may be either."""
    below = path.relative_to(top).parts
    hidden = any(part.startswith(".") for part in below)
    ours = any(part.endswith(OUTPUT_FOLDERS) for part in below[:-1])
    return not (hidden or ours or path.name.endswith(OUTPUT_SUFFIXES))


def _matches(pattern: Path, *, recursive: bool, as_videos: bool) -> list[Path]:
    """What a pattern stands for: pictures and videos, and those in folders, by name."""
    named = pattern.suffix and not glob.has_magic(pattern.suffix)
    magic = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
    top = Path(*pattern.parts[:magic])
    found: dict[Path, None] = {}
    for path in sorted(map(Path, glob.iglob(str(pattern), recursive=True))):
        if path.is_dir():
            inside = _in_folder(path, recursive=recursive, as_videos=as_videos)
        else:
            known = path.suffix.lower() in SUFFIXES | VIDEO_SUFFIXES
            inside = [path] if named or known else []
        found.update(dict.fromkeys(p for p in inside if _is_input(p, top)))
    return list(found)


def output_names(files: Sequence[Path]) -> list[str]:
    """A base name for the outputs of every file, all different.

    The stem where no other file has it, else the path below the folder that all files share, in
    one word (``b/x.jpg`` -> ``b_x``), then with the suffix; a file that is there several times
    (with different prompts) is numbered. Names depend on the list as a whole, not on who works on
    which part of it. Upper and lower case count as the same: file systems may not know them apart.
    """
    shared = _shared_folder(files)
    names: list[str | None] = [None] * len(files)
    taken: set[str] = set()
    candidates: list[str] = []
    for choose in (_stem, _flat, _flat_with_suffix):
        candidates = [_short(choose(file, shared)) for file in files]
        open_ = [i for i, name in enumerate(names) if name is None]
        count = collections.Counter(candidates[i].casefold() for i in open_)
        for i in open_:
            folded = candidates[i].casefold()
            if count[folded] == 1 and folded not in taken:
                names[i] = candidates[i]
                taken.add(folded)
    numbers: collections.Counter[str] = collections.Counter()
    for i, candidate in enumerate(candidates):
        while names[i] is None:
            numbers[candidate] += 1
            name = f"{candidate}_{numbers[candidate]}"
            if name.casefold() not in taken:
                names[i] = name
                taken.add(name.casefold())
    return [name for name in names if name is not None]


def _shared_folder(files: Sequence[Path]) -> Path:
    """The deepest folder above all files; nothing when some are absolute and some are not."""
    try:
        return Path(os.path.commonpath([file.parent for file in files]))
    except ValueError:
        return Path()


def _stem(file: Path, _: Path) -> str:
    return file.stem or "picture"


def _flat(file: Path, shared: Path) -> str:
    below = file.relative_to(shared) if file.is_relative_to(shared) else file
    folders = [part for part in below.parent.parts if part not in ("..", below.anchor)]
    return "_".join([*folders, file.stem])


def _flat_with_suffix(file: Path, shared: Path) -> str:
    return _flat(file, shared) + file.suffix.replace(".", "_")


def _short(name: str) -> str:
    """A long name keeps its end, and a digest of all of it."""
    data = os.fsencode(name)
    if len(data) <= NAME_BYTES:
        return name
    digest = hashlib.sha256(data).hexdigest()[:8]
    end = data[-(NAME_BYTES - 9) :].decode("utf-8", "ignore")
    return f"{digest}_{end}"


def is_video(path: Path) -> bool:
    """Whether a job about this path is about a video: by the suffix, or a folder of frames."""
    return path.suffix.lower() in VIDEO_SUFFIXES or path.is_dir()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of the file ``path`` at the end, at once or not at all.

    Raises:
      OSError: of what is done inside, with the name of ``path`` (a full disk names no file).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with named_errors(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """An empty temporary folder that takes the place of the folder ``path`` at the end.

    Nobody sees it half full; an older folder of that name disappears with all that is in it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with named_errors(path):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            if path.is_dir():
                shutil.rmtree(path)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turns an OSError, which may name no file or a temporary one, into one that names ``path``."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
