"""Predicted tracks of any model, or of ours, for the pairs of a data set.

Two forms: a list of results as YouTube-VIS has it (upstream ``YTVISResultsWriter`` in
``sam3/eval/ytvis_eval.py`` writes the same), which names videos and categories by the ids of the
ground truth; and files with ``videos``, ``categories`` and ``annotations`` of their own, which are
matched by the video's name and the phrase.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sam3_jax.data.annotations import MAX_BAD
from sam3_jax.data.entries import BadEntryError, is_id, read_json
from sam3_jax.data.records import AnnotationError, Problems
from sam3_jax.evaluation.video.records import Id, Key, Track, VideoDataset, VideoPredictions
from sam3_jax.evaluation.video.tracks import parse_id, parse_track, video_name

LISTS = ("videos", "annotations", "categories")


def load_video_predictions(
    path: Path, dataset: VideoDataset, max_bad: float = MAX_BAD
) -> VideoPredictions:
    """Reads predictions and assigns them to the pairs of ``dataset``.

    Args:
      path: a file, or a folder in which (at any depth) JSON files of either form lie.
      dataset: the ground truth.
      max_bad: largest share of unusable predictions.

    Raises:
      AnnotationError: unreadable, of neither form, too much damage, or of other videos.
    """
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    problems, notes = Problems(), []
    found: dict[Key, list[Track]] = {}
    total = strange = used = 0
    covered: set[Key] | None = set()
    for file in files:
        data = read_json(file)
        own = isinstance(data, dict) and all(isinstance(data.get(name), list) for name in LISTS)
        results = isinstance(data, list) and all(_is_result(entry) for entry in data)
        if path.is_dir() and not own and not results:
            continue  # a program's other files: settings, logs
        entries = _entries(data, file, own=own)
        if own:
            keys, asked = _keys_by_name(data, dataset)
            covered = covered if covered is None else covered | asked
        else:
            keys, covered = None, None
        prefix = f"{file.name}: " if len(files) > 1 else ""
        strange += _assign(entries, total, dataset, keys, found, problems, prefix)
        used, total = used + 1, total + len(entries)
    if not used:
        raise AnnotationError(f"{path}: there is no JSON file of predicted tracks in this folder")
    if total and not found and strange:
        raise AnnotationError(
            f"{path}: none of its {total} tracks belongs to a video-phrase pair of "
            f"{dataset.source}; do they have its video and category ids, or its names and phrases?"
        )
    problems.check(str(path), total, max_bad)
    if strange:
        notes.append(f"{strange} tracks of pairs outside the ground truth were left out")
    missing = 0 if covered is None else len(dataset.pairs.keys() - covered)
    if missing:
        notes.append(
            f"{missing} of {len(dataset.pairs)} pairs are not in the predictions (video or "
            "phrase): counted as nothing found"
        )
    return VideoPredictions(found, problems, notes)


def load_tracks(
    files: Mapping[Id, Path], dataset: VideoDataset, max_bad: float = MAX_BAD
) -> VideoPredictions:
    """Reads files of single videos, each made for a video of ``dataset`` by its phrases.

    Args:
      files: video id -> a file with one video, categories and annotations.

    Raises:
      AnnotationError: unreadable, or too much damage.
    """
    problems = Problems()
    found: dict[Key, list[Track]] = {}
    total = 0
    for video, file in files.items():
        data = read_json(file)
        own = {p.phrase: key for key, p in dataset.pairs.items() if key[0] == video}
        (number,) = (entry["id"] for entry in data["videos"])
        keys = {(number, c["id"]): own[c["name"]] for c in data["categories"] if c["name"] in own}
        _assign(data["annotations"], total, dataset, keys, found, problems, f"{file.name}: ")
        total += len(data["annotations"])
    problems.check("the predictions", total, max_bad)
    return VideoPredictions(found, problems, [])


def _is_result(entry: Any) -> bool:
    return isinstance(entry, dict) and "video_id" in entry


def _entries(data: Any, file: Path, *, own: bool) -> list[Any]:
    if not own and not isinstance(data, list):
        raise AnnotationError(
            f"{file}: is neither a list of YouTube-VIS results nor has it videos, categories and "
            "annotations"
        )
    entries = data["annotations"] if own else data
    scored = [e for e in entries if isinstance(e, dict) and ("score" in e or "scores" in e)]
    if entries and not scored:
        raise AnnotationError(f"{file}: its tracks have no score; is this a ground truth?")
    return entries


def _assign(
    entries: list[Any],
    start: int,
    dataset: VideoDataset,
    keys: dict[Key, Key] | None,
    found: dict[Key, list[Track]],
    problems: Problems,
    prefix: str,
) -> int:
    """Adds tracks, numbered from ``start`` on, to ``found``; returns how many are of no pair."""
    strange = 0
    for number, entry in enumerate(entries):
        try:
            if not isinstance(entry, dict):
                raise BadEntryError("is not an object with fields")
            key = (parse_id(entry.get("video_id")), parse_id(entry.get("category_id")))
            if keys is not None:
                key = keys.get(key)
            if key not in dataset.pairs:
                strange += 1
                continue
            track = parse_track(entry, start + number, dataset.videos[key[0]], truth=False)
            found.setdefault(key, []).append(track)
        except BadEntryError as error:
            problems.add(str(error), f"{prefix}track {number}")
    return strange


def _keys_by_name(data: dict[str, Any], dataset: VideoDataset) -> tuple[dict[Key, Key], set[Key]]:
    """(video id, category id) of a file -> pairs of the ground truth; all pairs it answers for."""
    videos: dict[str, list[Id]] = {}
    for video in dataset.videos.values():
        for name in {video.name, _stem(video.name)}:
            videos.setdefault(name, []).append(video.video_id)
    phrases: dict[str, Id] = {}
    for number, phrase in dataset.categories.items():
        phrases.setdefault(phrase, number)
    keys: dict[Key, Key] = {}
    for video in filter(_has_id, data["videos"]):
        name = video_name(video)
        same = videos.get(name) or videos.get(_stem(name), ())
        for category in filter(_has_id, data["categories"]):
            # Two videos of one name in different folders: the stem says nothing.
            if len(same) == 1 and category.get("name") in phrases:
                own = (parse_id(video["id"]), parse_id(category["id"]))
                keys[own] = (same[0], phrases[category["name"]])
    return keys, set(keys.values())


def _has_id(entry: Any) -> bool:
    return isinstance(entry, dict) and is_id(entry.get("id"))


def _stem(name: str) -> str:
    """``clips/a.mp4`` and ``a`` are the same video."""
    path = PurePosixPath(name)
    known = path.suffix.lower() in (".mp4", ".mov", ".webm", ".avi", ".mkv", ".m4v")
    return path.stem if known else path.name
