"""Videos in memory: tracks, the video-phrase pairs they belong to, and what a model found."""

from __future__ import annotations

from typing import Any, NamedTuple

from sam3_jax.data.records import Problems

Id = int | str
Key = tuple[Id, Id]  # (video id, category id)
Mask = dict[str, Any]  # COCO's compressed run lengths at the video's size


class Track(NamedTuple):
    """One object through a video, annotated or predicted."""

    number: int  # its place among all of the file: assignments of equal merit go by it
    masks: tuple[Mask | None, ...]  # one a frame; None: not visible
    score: float = 1.0


class Video(NamedTuple):
    """A video of a data set."""

    video_id: Id
    name: str
    size: tuple[int, int]  # (height, width)
    length: int  # frames
    file_name: str | None = None  # of a video file, or
    frame_names: tuple[str, ...] = ()  # of its frames


class Pair(NamedTuple):
    """A video and a phrase; no targets: the phrase is not in the video."""

    key: Key
    phrase: str
    targets: tuple[Track, ...]


class VideoDataset(NamedTuple):
    """All pairs of an annotation file."""

    layout: str  # "saco": the file names its pairs; "ytvis": videos times categories
    videos: dict[Id, Video]
    pairs: dict[Key, Pair]
    categories: dict[Id, str]  # phrases, in the order of the file
    problems: Problems
    source: str


class VideoPredictions(NamedTuple):
    """What a model found. A pair that is not in ``found`` has no tracks."""

    found: dict[Key, list[Track]]
    problems: Problems
    notes: list[str]  # what a reader of the figures should know
