"""Runs a predictor over annotated videos: by their phrases, or from masks of objects.

Both go on where an earlier run ended (``sam3_jax/video/bulk.py``): a video is predicted once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sam3_jax.evaluation.video.records import Id, Pair, Video, VideoDataset
from sam3_jax.inference.files import output_names
from sam3_jax.inference.jobs import make_job
from sam3_jax.video import bulk
from sam3_jax.video.cut import Span
from sam3_jax.video.follow import TRACKS_SUFFIX
from sam3_jax.video.frames import DEFAULT_RATE, VideoError
from sam3_jax.video.pictures import Pictures
from sam3_jax.video.predictor import VideoPredictor
from sam3_jax.video.reader import VideoSource, open_video
from sam3_jax.video.work import VideoSettings, VideoWork, ask

FRAME_FOLDERS = ("", "JPEGImages")  # in the folder of videos; YouTube-VIS has the second
SUFFIXES = ("", ".mp4", ".mov", ".webm", ".avi", ".mkv")  # of a video that is named without


class Predicted(NamedTuple):
    """Where the tracks of each video are, and why those of others are not."""

    files: dict[Id, Path]
    failed: dict[Id, str]


def predict_tracks(
    predictor: VideoPredictor,
    dataset: VideoDataset,
    videos: Path,
    output: Path,
    *,
    info: dict[str, Any],
) -> Predicted:
    """Looks in every video for the phrases of its pairs, all in one pass.

    A video that cannot be used is reported on stderr, and the run goes on.

    Args:
      videos: folder of the files, or of the folders of frames, that the annotations name.
      output: an existing folder, for a file of tracks a video.
      info: the settings that results depend on.

    Raises:
      UsageError: when the folder holds results of other settings.
      OSError: when results cannot be written.
    """
    asked: dict[Id, list[Pair]] = {}
    for key, pair in dataset.pairs.items():
        asked.setdefault(key[0], []).append(pair)
    numbers = list(asked)
    names = output_names([Path(dataset.videos[i].name) for i in numbers])
    works = [
        _work(place, dataset.videos[i], [pair.phrase for pair in asked[i]], name, videos)
        for place, (i, name) in enumerate(zip(numbers, names, strict=True))
    ]
    summary = bulk.run(predictor, works, output, VideoSettings(overlay=False), info=info)
    files, failed = {}, {}
    for number, work in zip(numbers, works, strict=True):
        if work.key in summary.failed:
            failed[number] = summary.failed[work.key]
        else:
            files[number] = output / f"{work.name}{TRACKS_SUFFIX}"
    return Predicted(files, failed)


def _work(place: int, video: Video, phrases: Sequence[str], name: str, videos: Path) -> VideoWork:
    job = make_job(video.name, phrases=list(dict.fromkeys(phrases)))
    return VideoWork(
        index=place,
        key=f"{video.video_id}#{job.key}",
        file_name=video.name,
        name=name,
        phrases=job.phrases,
        open=lambda: open_annotated(video, videos),
        ask=lambda session: ask(session, job, Span()),
    )


def open_annotated(video: Video, folder: Path) -> VideoSource:
    """The frames that a video's annotations are about.

    Raises:
      VideoError: when they are not there, or are others in size or number.
    """
    source = _open(video, folder)
    if source.size != video.size:
        raise VideoError(
            f"{source.name}: is {source.size[1]} x {source.size[0]} pixels, its annotations are "
            f"for {video.size[1]} x {video.size[0]}"
        )
    if source.count() != video.length:
        raise VideoError(
            f"{source.name}: has {source.count()} frames, its annotations are for {video.length}"
        )
    return source


def _open(video: Video, folder: Path) -> VideoSource:
    roots = [folder / name for name in FRAME_FOLDERS]
    if video.frame_names:
        for root in roots:
            frames = [root / name for name in video.frame_names]
            if any(frame.is_file() for frame in frames):
                names = tuple(frame.name for frame in frames)
                return VideoSource(Pictures(frames, video.name, DEFAULT_RATE), names)
        raise VideoError(f"{roots[0] / video.frame_names[0]}: no such file, nor the other frames")
    name = video.file_name or video.name
    files = [root / f"{name}{suffix}" for root in roots for suffix in SUFFIXES]
    path = next((file for file in files if file.exists()), None)
    if path is None:
        raise VideoError(f"{files[0]}: no such file or folder")
    return open_video(path)
