"""Annotation files of videos: YouTube-VIS, and SA-Co VEval, which names its pairs besides.

Upstream: ``scripts/eval/veval/README.md``, ``sam3/eval/ytvis_coco_wrapper.py``. A damaged
annotation is counted, kept by id and skipped, and its pair with it: of a pair that lost a track
nobody can say what is missing.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sam3_jax.data.annotations import MAX_BAD, ROBOFLOW_FILE
from sam3_jax.data.entries import BadEntryError, read_json
from sam3_jax.data.records import AnnotationError, Problems
from sam3_jax.evaluation.video.davis_folders import sequences_folder
from sam3_jax.evaluation.video.records import Id, Key, Pair, Track, Video, VideoDataset
from sam3_jax.evaluation.video.tracks import parse_id, parse_track, parse_video


def video_layout(path: Path) -> str | None:
    """ "davis" for folders of indexed PNGs, "tracks" for JSON with videos, None for pictures."""
    if path.is_dir():
        roboflow = (path / ROBOFLOW_FILE).exists() or any(path.glob(f"*/{ROBOFLOW_FILE}"))
        return "davis" if not roboflow and sequences_folder(path) else None
    return "tracks" if _has_list(path, b"videos") and not _has_list(path, b"images") else None


def load_video_annotations(
    path: Path, *, negatives: bool = True, max_bad: float = MAX_BAD
) -> VideoDataset:
    """Reads ground truth.

    Args:
      path: a JSON file.
      negatives: of YouTube-VIS, keep the pairs of a video with categories that it does not show.
        SA-Co files name their negatives themselves (``video_np_pairs``).
      max_bad: largest share of the file's entries that may be unusable.

    Raises:
      AnnotationError: unreadable, of no known layout, too much damage, or nothing left.
    """
    data = read_json(path)
    _check_lists(data, path)
    problems = Problems()
    videos: dict[Id, Video] = {}
    for number, entry in enumerate(data["videos"]):
        try:
            video = parse_video(entry)
            if video.video_id in videos:
                raise BadEntryError("a second video of the same id")
            videos[video.video_id] = video
        except BadEntryError as error:
            problems.add(str(error), f"video {number}")
    categories = _categories(data["categories"], problems)
    targets, damaged = _targets(data["annotations"], videos, categories, problems)
    named = data.get("video_np_pairs")
    if isinstance(named, list):
        keys = _named_pairs(named, videos, categories, problems)
    else:
        keys = [(v, c) for v in videos for c in categories] if negatives else []
    pairs = {
        key: Pair(key, categories[key[1]], tuple(targets.get(key, ())))
        for key in dict.fromkeys([*keys, *targets])
        if key not in damaged
    }
    parts = (data["videos"], data["annotations"], named if isinstance(named, list) else ())
    problems.check(str(path), sum(map(len, parts)), max_bad)
    if not pairs:
        raise AnnotationError(f"{path}: there is no usable video-phrase pair in it")
    layout = "saco" if isinstance(named, list) else "ytvis"
    return VideoDataset(layout, videos, pairs, categories, problems, str(path))


def _check_lists(data: dict[str, Any], path: Path) -> None:
    if not isinstance(data, dict) or not isinstance(data.get("videos"), list):
        raise AnnotationError(f"{path}: has no list named videos, as YouTube-VIS' files do")
    if not isinstance(data.get("annotations"), list):
        raise AnnotationError(
            f"{path}: has no list named annotations; the annotations of YouTube-VIS' valid and "
            "test splits are not public, take a split of train.json"
        )
    if not isinstance(data.get("categories"), list) or not data["categories"]:
        raise AnnotationError(f"{path}: has no list named categories, so there are no phrases")


def _categories(entries: list[Any], problems: Problems) -> dict[Id, str]:
    found = {}
    for number, entry in enumerate(entries):
        try:
            found[parse_id(entry["id"])] = str(entry["name"])
        except (BadEntryError, KeyError, TypeError):
            problems.add("without id or name", f"category {number}")
    return found


def _targets(
    entries: list[Any], videos: dict[Id, Video], categories: dict[Id, str], problems: Problems
) -> tuple[dict[Key, list[Track]], set[Key]]:
    """Tracks of each pair, and the pairs that lost one."""
    targets: dict[Key, list[Track]] = {}
    damaged: set[Key] = set()
    for number, entry in enumerate(entries):
        name, key = f"annotation {number}", None
        try:
            if not isinstance(entry, dict):
                raise BadEntryError("is not an object with fields")
            name = f"annotation {entry.get('id', number)}"
            wanted = (parse_id(entry.get("video_id")), parse_id(entry.get("category_id")))
            if wanted[0] not in videos or wanted[1] not in categories:
                raise BadEntryError("of an unknown video or category")
            key = wanted
            track = parse_track(entry, number, videos[key[0]], truth=True)
            if not entry.get("iscrowd"):
                targets.setdefault(key, []).append(track)
        except BadEntryError as error:
            problems.add(str(error), name)
            if key is not None:
                damaged.add(key)
    return targets, damaged


def _named_pairs(
    entries: list[Any], videos: dict[Id, Video], categories: dict[Id, str], problems: Problems
) -> Sequence[Key]:
    keys = []
    for number, entry in enumerate(entries):
        try:
            key = (parse_id(entry["video_id"]), parse_id(entry["category_id"]))
        except (BadEntryError, KeyError, TypeError):
            problems.add("without video_id or category_id", f"pair {number}")
            continue
        if key[0] in videos and key[1] in categories:
            keys.append(key)
        else:
            problems.add("of an unknown video or category", f"pair {number}")
    return keys


def _has_list(path: Path, name: bytes) -> bool:
    """Whether there is a list of that name, without parsing what may be gigabytes.

    No for what cannot be read: others say why.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            # A quote within a text is escaped in JSON, so this is a field.
            return re.search(rb'"%s"\s*:\s*\[' % name, data) is not None
    except (OSError, ValueError):  # ValueError: an empty file
        return False
