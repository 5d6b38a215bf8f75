"""Annotations of videos into films: YouTube-VIS files, and folders in the layout of SA-V.

- YouTube-VIS (also SA-Co VEval's JSON): ``videos`` with ``file_names`` of their frames, and
  ``annotations`` with a mask a frame or null.
- SA-V (``NAME_manual.json`` or ``NAME_auto.json`` beside ``NAME.mp4``, or beside a folder NAME with
  all frames): ``masklet`` holds, for every annotated frame, a mask an object. Videos have 24 frames
  a second, annotations 6: every fourth frame is annotated.

A damaged mask is counted, kept by id, and unknown from then on; a masklet without a usable mask is
left out; a video that cannot be used too. Nothing of this ends a run before it is too much.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from sam3_jax.data.entries import BadEntryError, is_id, read_json
from sam3_jax.data.films import Film, Mask, Masklet
from sam3_jax.data.masks import BrokenMaskError, to_rle
from sam3_jax.data.records import AnnotationError, Problems

SAV_SUFFIXES = ("_manual.json", "_auto.json")
SAV_EVERY = 4  # frames between annotated ones where a file does not say how many it has


def load_films(path: Path, *, max_bad: float) -> tuple[list[Film], Problems]:
    """Reads annotations; frames are not looked at.

    Args:
      path: a YouTube-VIS file, or a folder with SA-V's files anywhere in it.
      max_bad: largest share of entries that may be unusable.

    Raises:
      AnnotationError: unreadable, of no known layout, too much damage, or nothing left.
    """
    problems = Problems()
    if path.is_dir():
        files = sorted(f for f in path.rglob("*.json") if f.name.endswith(SAV_SUFFIXES))
        if not files:
            raise AnnotationError(
                f"{path}: has no files named NAME_manual.json or NAME_auto.json, as SA-V has; name "
                "a YouTube-VIS JSON file, or SA-V's folder"
            )
        films, total = _sav_films(files, path, problems)
    else:
        films, total = _ytvis_films(read_json(path), path, problems)
    problems.check(str(path), total, max_bad)
    if not films:
        raise AnnotationError(f"{path}: there is no video with a usable masklet in it")
    return films, problems


def _ytvis_films(data: Any, path: Path, problems: Problems) -> tuple[list[Film], int]:
    lists = ("videos", "annotations")
    if not isinstance(data, dict) or not all(isinstance(data.get(name), list) for name in lists):
        raise AnnotationError(
            f"{path}: has no lists named videos and annotations, as YouTube-VIS' files do; the "
            "annotations of its valid and test splits are not public"
        )
    films: dict[Any, Film] = {}
    for number, entry in enumerate(data["videos"]):
        try:
            film = _film_of(entry)
            if entry["id"] in films:
                raise BadEntryError("a second video of the same id")
            films[entry["id"]] = film
        except BadEntryError as error:
            problems.add(str(error), f"video {number}")
    found: dict[Any, list[Masklet]] = {number: [] for number in films}
    for number, entry in enumerate(data["annotations"]):
        name = f"annotation {entry.get('id', number) if isinstance(entry, dict) else number}"
        try:
            if not isinstance(entry, dict) or not is_id(entry.get("video_id")):
                raise BadEntryError("annotation without video_id")
            if entry["video_id"] not in films:
                raise BadEntryError("annotation of an unknown video")
            if not entry.get("iscrowd"):
                film, masks = films[entry["video_id"]], entry.get("segmentations")
                masklet = _masklet(str(entry.get("id", number)), masks, film, name, problems)
                found[entry["video_id"]].append(masklet)
        except BadEntryError as error:
            problems.add(str(error), name)
    whole = [film._replace(masklets=tuple(found[key])) for key, film in films.items()]
    total = len(data["videos"]) + len(data["annotations"])
    return [film for film in whole if film.masklets], total


def _film_of(entry: Any) -> Film:
    if not isinstance(entry, dict) or not is_id(entry.get("id")):
        raise BadEntryError("video without id")
    names = entry.get("file_names")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise BadEntryError("video without file_names")
    return Film(str(entry["id"]), _size(entry.get("height"), entry.get("width")), tuple(names), ())


def _size(height: Any, width: Any) -> tuple[int, int]:
    for value in (height, width):
        if not isinstance(value, int | float) or isinstance(value, bool) or value < 1:
            raise BadEntryError("video without height and width")
    return int(height), int(width)


def _masklet(name: str, masks: Any, film: Film, where: str, problems: Problems) -> Masklet:
    """One object; damaged masks are unknown."""
    if not isinstance(masks, list) or len(masks) != len(film.names):
        raise BadEntryError("masks of another number of frames than the video")
    found: list[Mask | None] = []
    unknown = set()
    for number, mask in enumerate(masks):
        try:
            found.append(_visible(mask, film.size))
        except BrokenMaskError as error:
            problems.add(str(error), f"{where} frame {number}")
            found.append(None)
            unknown.add(number)
    if not any(found):
        raise BadEntryError("a masklet that is in no frame")
    return Masklet(name, tuple(found), frozenset(unknown))


def _visible(mask: Any, size: tuple[int, int]) -> Mask | None:
    """None for no mask and for an empty one."""
    rle = to_rle(mask, size) if mask else None
    return rle if rle is not None and coco_mask.area(rle) else None


def _sav_films(files: Sequence[Path], folder: Path, problems: Problems) -> tuple[list[Film], int]:
    """Manual and automatic masklets of a video are one film."""
    films: dict[str, Film] = {}
    total = 0
    for file in files:
        name = str(file.relative_to(folder))
        suffix = next(s for s in SAV_SUFFIXES if name.endswith(s))
        video = name.removesuffix(suffix)
        try:
            film, count = _sav_film(read_json(file), video, name, problems)
        except (BadEntryError, AnnotationError) as error:
            problems.add("file that cannot be used", f"{name} ({error})")
            total += 1
            continue
        total += 1 + count
        before = films.get(video)
        if before is not None and (before.names, before.size) != (film.names, film.size):
            problems.add("other frames than in the video's first file", name)
            continue
        own = before.masklets if before else ()
        renamed = tuple(m._replace(id=suffix[1:2] + m.id) for m in film.masklets)
        films[video] = film._replace(masklets=(*own, *renamed))
    return [film for film in films.values() if film.masklets], total


def _sav_film(data: Any, video: str, where: str, problems: Problems) -> tuple[Film, int]:
    """A file's film, and how many masklets it names."""
    rows = data.get("masklet") if isinstance(data, dict) else None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        raise BadEntryError("no list named masklet with a list a frame")
    size = _size(data.get("video_height"), data.get("video_width"))
    length, every = data.get("video_frame_count"), SAV_EVERY
    if isinstance(length, int | float) and length >= len(rows):
        every = max(1, round(length / len(rows)))
    names = tuple(f"{video}#{number * every}" for number in range(len(rows)))
    film = Film(video, size, names, ())
    objects = max(map(len, rows))
    masklets = []
    for number in range(objects):
        masks = [row[number] if number < len(row) else None for row in rows]
        name = f"{where} masklet {number}"
        try:
            masklets.append(_masklet(str(number), masks, film, name, problems))
        except BadEntryError as error:
            problems.add(str(error), name)
    return film._replace(masklets=tuple(masklets)), objects


def frame_number(name: str) -> tuple[str, int] | None:
    """Video and number of a frame that is no file of its own (``VIDEO#12``)."""
    video, mark, number = name.rpartition("#")
    return (video, int(number)) if mark and number.isdecimal() else None
