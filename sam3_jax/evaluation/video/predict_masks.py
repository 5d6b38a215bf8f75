"""Follows objects that are given by masks, as DAVIS' semi-supervised task has it.

An object is shown to the model in the first annotated frame that it is in. What is found is written
as the annotations are: a folder a sequence, an indexed PNG a frame, a label an object.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Bool
from tqdm import tqdm

from sam3_jax.data.records import AnnotationError
from sam3_jax.evaluation.video.davis import VOID, Labels
from sam3_jax.evaluation.video.davis_folders import BadMaskError, read_labels
from sam3_jax.inference import records
from sam3_jax.inference.files import replacing_folder
from sam3_jax.inference.visualize import palette
from sam3_jax.video import bulk
from sam3_jax.video.bulk import VideoSummary
from sam3_jax.video.frames import VideoError
from sam3_jax.video.predictor import VideoPredictor
from sam3_jax.video.reader import open_video
from sam3_jax.video.session import Session
from sam3_jax.video.work import VideoSettings, VideoWork

Given = list[tuple[str, int, Bool[np.ndarray, "h w"]]]  # frame's name, label, mask


def frames_folder(gt: Path, annotations: Path) -> Path:
    """Where a copy of DAVIS has the frames of its annotations.

    Args:
      gt: for the message.
      annotations: the folder with a folder of PNGs a sequence.

    Raises:
      AnnotationError: it is not there.
    """
    parts = ["JPEGImages" if part == "Annotations" else part for part in annotations.parts]
    folder = Path(*parts)
    if folder == annotations or not folder.is_dir():
        raise AnnotationError(
            f"{gt}: the frames are not beside the annotations (JPEGImages); --images names the "
            "folder that has a folder of frames for each sequence"
        )
    return folder


def predict_masks(
    predictor: VideoPredictor,
    sequences: Mapping[str, tuple[Path, ...]],
    frames: Path,
    output: Path,
    *,
    info: dict[str, Any],
) -> VideoSummary:
    """Writes ``output/SEQUENCE/FRAME.png`` for every annotated frame.

    A sequence that cannot be used is reported on stderr, and the run goes on.

    Args:
      sequences: annotated frames by name.
      frames: folder with a folder of pictures for each.
      output: an existing folder.
      info: the settings that results depend on.

    Raises:
      UsageError: when the folder holds results of other settings.
      OSError: when results cannot be written.
    """
    works = [
        VideoWork(
            index=place,
            key=name,
            file_name=name,
            name=name,
            phrases=("object",),
            open=lambda folder=frames / name: open_video(folder),
            ask=lambda session, annotated=annotated: _show_masks(session, annotated),
        )
        for place, (name, annotated) in enumerate(sequences.items())
    ]

    def follow(
        predictor: VideoPredictor,
        work: VideoWork,
        output: Path,
        settings: VideoSettings,
        run: dict[str, Any],
        bar: tqdm,
    ) -> dict[str, Any]:
        return _follow(predictor, work, output, sequences[work.name], bar)

    settings = VideoSettings(overlay=False)
    return bulk.run(predictor, works, output, settings, info=info, follow=follow)


def first_masks(annotated: tuple[Path, ...]) -> Given:
    """For every label its mask in the first frame that has it; for 255 if there is no other."""
    given: Given = []
    known: set[int] = {0, VOID}
    void = None
    for path in annotated:
        try:
            labels = read_labels(path, binary=False)
        except BadMaskError:  # counted where the result is measured
            continue
        for label in sorted(set(np.unique(labels).tolist()) - known):
            given.append((path.stem, label, labels == label))
            known.add(label)
        if void is None and (labels == VOID).any():
            void = path.stem, 1, labels == VOID
    return given or ([void] if void else [])


def _show_masks(session: Session, annotated: tuple[Path, ...]) -> dict[int, int]:
    """Objects of the session -> labels."""
    places = _places(session)
    labels = {}
    for stem, label, mask in first_masks(annotated):
        if stem not in places:
            raise VideoError(f"{session.video.name}: has no frame {stem}, which is annotated")
        labels[session.add_mask(places[stem], mask)] = label
    if not labels:
        raise VideoError(f"{annotated[0].parent}: no object is annotated")
    return labels


def _places(session: Session) -> dict[str, int]:
    return {Path(name).stem: i for i, name in enumerate(session.video.frame_names or ())}


def _follow(
    predictor: VideoPredictor,
    work: VideoWork,
    output: Path,
    annotated: tuple[Path, ...],
    bar: tqdm,
) -> dict[str, Any]:
    """Follows the objects of one sequence; its record."""
    start = time.monotonic()
    session = predictor.start(work.open())
    labels = work.ask(session)
    bar.reset(total=session.video.count())
    stems = {place: stem for stem, place in _places(session).items()}
    wanted = {path.stem for path in annotated}
    bad, frames = [], 0
    with replacing_folder(output / work.name) as folder:
        for frame in session.propagate(exclusive=True):
            if frame.error is not None:
                bad.append(frame.error)
            if stems[frame.index] in wanted:
                found = np.zeros(session.video.size, np.uint8)
                for object_id, mask in zip(frame.ids.tolist(), frame.masks, strict=True):
                    found[mask] = labels[object_id]
                _write(folder / f"{stems[frame.index]}.png", found)
            frames += 1
            bar.update()
    record = records.ok_record(
        work.key,
        work.file_name,
        index=work.index,
        size=session.video.size,
        seconds=time.monotonic() - start,
        phrases=work.phrases,
        annotations=[],
        outputs=[work.name],
    )
    counts = {"frames": frames, "objects": len(labels), "bad_frames": len(bad)}
    return record | counts | {"first_error": (bad or [None])[0], "problems": []}


def _write(path: Path, labels: Labels) -> None:
    picture = PIL.Image.fromarray(labels)
    picture.putpalette([0, 0, 0, *(value for color in palette(255) for value in color)])
    picture.save(path)
