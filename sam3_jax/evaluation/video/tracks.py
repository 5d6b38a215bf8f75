"""Single entries of files in YouTube-VIS' layout: checked, masks as compressed run lengths."""

from __future__ import annotations

from typing import Any

from pycocotools import mask as coco_mask

from sam3_jax.data.entries import BadEntryError, is_id, is_number
from sam3_jax.data.masks import BrokenMaskError, to_rle
from sam3_jax.evaluation.video.records import Id, Mask, Track, Video


def parse_id(value: Any) -> Id:
    """An id; digits in quotes are the number, because files mix the two.

    Raises:
      BadEntryError: when there is none.
    """
    if not is_id(value):
        raise BadEntryError("an id is missing or is neither a number nor a text")
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def parse_video(entry: Any) -> Video:
    """An entry of ``videos``.

    Raises:
      BadEntryError: without id, size or number of frames.
    """
    if not isinstance(entry, dict):
        raise BadEntryError("is not an object with fields")
    video_id, names = parse_id(entry.get("id")), entry.get("file_names")
    length = len(names) if isinstance(names, list) and names else entry.get("length")
    for value in (entry.get("height"), entry.get("width"), length):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BadEntryError("height, width or length is missing")
    size, file = (entry["height"], entry["width"]), entry.get("file_name")
    frames = tuple(map(str, names)) if isinstance(names, list) else ()
    return Video(
        video_id, video_name(entry), size, length, file if isinstance(file, str) else None, frames
    )


def video_name(entry: dict[str, Any]) -> str:
    """What a video is called: its name, else the folder of its frames, else its id."""
    for field in ("video_name", "name", "file_name"):
        if isinstance(entry.get(field), str) and entry[field]:
            return entry[field]
    names = entry.get("file_names")
    first = names[0] if isinstance(names, list) and names else ""
    folder = first.rpartition("/")[0] if isinstance(first, str) else ""
    return folder or str(entry.get("id"))


def parse_track(entry: dict[str, Any], number: int, video: Video, *, truth: bool) -> Track:
    """An annotation or a prediction.

    Args:
      entry: with ``segmentations``, one a frame or null; of a prediction with ``score``, or with
        ``scores`` of its frames, whose mean counts.
      number: its place in the file.
      video: that it belongs to.
      truth: refuse what cannot be found, a track without a single pixel. A prediction like that is
        a wrong one and stays.

    Raises:
      BadEntryError: when it cannot be used.
    """
    masks = entry.get("segmentations")
    if not isinstance(masks, list):
        raise BadEntryError("no list of segmentations")
    if len(masks) != video.length:
        raise BadEntryError("segmentations of another number of frames than the video")
    try:
        rles = tuple(_visible(mask, video.size) for mask in masks)
    except BrokenMaskError as error:
        raise BadEntryError(str(error)) from error
    if truth and not any(rles):
        raise BadEntryError("a track that is in no frame")
    return Track(number, rles, 1.0 if truth else _score(entry))


def _visible(mask: Any, size: tuple[int, int]) -> Mask | None:
    """None for no mask and for an empty one."""
    rle = to_rle(mask, size) if mask else None
    return rle if rle is not None and coco_mask.area(rle) else None


def _score(entry: dict[str, Any]) -> float:
    score, scores = entry.get("score"), entry.get("scores")
    if score is None and isinstance(scores, list):
        seen = [value for value in scores if is_number(value)]
        score = sum(seen) / len(seen) if seen else None
    if not is_number(score):
        raise BadEntryError("no score")
    return float(score)
