"""Folders of indexed PNGs, as DAVIS has: a folder a sequence, a file a frame, a label an object.

The label 0 is background; 255 in the annotations marks pixels that do not count. Where 255 is the
only label of a sequence, as in DAVIS 2016, it is the one object.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image

from sam3_jax.data.records import AnnotationError, Problems
from sam3_jax.evaluation.video.davis import VOID, Labels

ROOTS = ("", "Annotations", "Annotations/480p", "Annotations/Full-Resolution")
READABLE = ("1", "L", "P")  # Pillow's modes with one small number a pixel
MIN_FRAMES = 3  # the first and the last one do not count


class BadMaskError(ValueError):
    """A file without labels; its text says why."""


class DavisSequence(NamedTuple):
    """One annotated sequence and what was predicted for it."""

    name: str
    frames: tuple[Path, ...]  # annotated, in order, those that count
    found: dict[str, Path]  # frame's name -> prediction
    objects: tuple[int, ...]
    binary: bool  # 255 is the object, not void


def sequences_folder(path: Path) -> Path | None:
    """The folder with one folder of PNGs a sequence: itself, or within a copy of DAVIS."""
    for root in ROOTS:
        folder = path / root
        if folder.is_dir() and any(_frames(child) for child in _folders(folder)):
            return folder
    return None


def annotated_frames(
    folder: Path, names: Sequence[str] | None = None
) -> dict[str, tuple[Path, ...]]:
    """The annotated frames of each sequence.

    Args:
      folder: of :func:`sequences_folder`.
      names: of the sequences that are wanted; None: all that are annotated.

    Raises:
      AnnotationError: no such sequence.
    """
    found = {child.name: _frames(child) for child in _folders(folder)}
    for name in names or ():
        if not found.get(name):
            raise AnnotationError(f"{folder}: has no sequence {name}; is it in another split?")
    return {name: found[name] for name in names or [n for n, frames in found.items() if frames]}


def load_sequences(
    gt: Path, predictions: Path, names: Sequence[str] | None = None
) -> tuple[list[DavisSequence], Problems, list[str]]:
    """Finds the frames of all sequences, and which objects are annotated in them.

    Args:
      gt: a folder with a folder of PNGs a sequence, or a copy of DAVIS.
      predictions: the same of a model; files have the names of the annotated ones.
      names: of the sequences to measure; None: all that are annotated.

    Returns:
      the sequences, what is wrong with their files, and notes for a reader of the figures.

    Raises:
      AnnotationError: no such folders, no such sequence, or nothing to measure.
    """
    folders = [_folder(path) for path in (gt, predictions)]
    annotated = annotated_frames(folders[0], names)
    problems, notes, sequences = Problems(), [], []
    for name in annotated:
        found = {path.stem: path for path in _frames(folders[1] / name)}
        if len(annotated[name]) < MIN_FRAMES:
            problems.add("sequences of fewer than three frames, nothing to measure", name)
            continue
        if not found:
            problems.add("sequences without predictions, counted as nothing found", name)
        sequences.append(_sequence(name, annotated[name], found, problems))
    if sequences and not any(sequence.found for sequence in sequences):
        raise AnnotationError(
            f"{folders[1]}: has none of the {len(sequences)} sequences of {folders[0]}"
        )
    for sequence in [s for s in sequences if not (s.objects and s.frames)]:
        notes.append(f"{sequence.name}: has no annotated object or no readable frame, left out")
        sequences.remove(sequence)
    if not sequences:
        raise AnnotationError(
            f"{folders[0]}: has nothing to measure; {'; '.join([*problems.lines(), *notes])}"
        )
    return sequences, problems, notes


def read_frames(sequence: DavisSequence, problems: Problems) -> Iterator[tuple[Labels, Labels]]:
    """(predicted, annotated) labels of one frame after the other.

    Raises:
      AnnotationError: another size than the annotation, or an object that is not annotated.
    """
    for path in sequence.frames:
        truth = read_labels(path, binary=sequence.binary)
        file = sequence.found.get(path.stem)
        found = np.zeros_like(truth)
        if file is not None:
            try:
                found = read_labels(file, binary=sequence.binary)
            except BadMaskError as error:
                problems.add(f"predictions that {error}, counted as nothing found", str(file))
        elif sequence.found:
            problems.add("frames without a prediction, counted as nothing found", str(path))
        if found.shape != truth.shape:
            raise AnnotationError(
                f"{file}: is {found.shape[1]} x {found.shape[0]} pixels, {path} is "
                f"{truth.shape[1]} x {truth.shape[0]}; write masks at the annotation's size"
            )
        strange = set(np.unique(found).tolist()) - {0, *sequence.objects}
        if strange:
            raise AnnotationError(
                f"{file}: has the label {min(strange)}, the objects of {sequence.name} are "
                f"{', '.join(map(str, sequence.objects))}; predictions need the labels of the "
                "annotations, and no other ones"
            )
        yield found, truth


def _sequence(
    name: str, frames: Sequence[Path], found: dict[str, Path], problems: Problems
) -> DavisSequence:
    labels: set[int] = set()
    good = []
    for path in frames:
        try:
            labels |= set(np.unique(read_labels(path, binary=False)).tolist())
            good.append(path)
        except BadMaskError as error:
            problems.add(f"annotations that {error}, left out", str(path))
    counted = set(frames[1:-1])
    binary = labels - {0} == {VOID}
    objects = (1,) if binary else tuple(sorted(labels - {0, VOID}))
    return DavisSequence(name, tuple(p for p in good if p in counted), found, objects, binary)


def read_labels(path: Path, *, binary: bool) -> Labels:
    """The labels of a PNG; ``binary``: 1 for everything that is not background.

    Raises:
      BadMaskError: when it cannot be read or is none of indexed pixels.
    """
    try:
        with PIL.Image.open(path) as picture:
            if picture.mode not in READABLE:
                raise BadMaskError(f"are {picture.mode} pictures, not indexed ones")
            labels = np.asarray(picture).astype(np.uint8)
    except (OSError, SyntaxError) as error:  # Pillow's for a damaged PNG
        raise BadMaskError("cannot be read") from error
    return (labels > 0).astype(np.uint8) if binary else labels


def _folder(path: Path) -> Path:
    folder = sequences_folder(path) if path.is_dir() else None
    if folder is None:
        raise AnnotationError(
            f"{path}: is no folder with a folder of PNG files for each sequence, as DAVIS has"
        )
    return folder


def _folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir())


def _frames(folder: Path) -> tuple[Path, ...]:
    """The PNG files of a sequence by name: DAVIS pads its numbers with zeros."""
    return tuple(sorted(folder.glob("*.png"))) if folder.is_dir() else ()
