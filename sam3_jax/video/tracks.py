"""A video's results as one file in YouTube-VIS layout: for every object a mask in every frame.

    {"schema_version": 1, "info": {...the run...},
     "videos": [{"id": 1, "file_name": "clip.mp4", "width": 640, "height": 480, "length": 250,
                 "fps": 25.0, "times": [0.0, 0.04, ...], "errors": {"17": "..."}}],
     "categories": [{"id": 1, "name": "red car"}],
     "annotations": [{"id": 3, "video_id": 1, "category_id": 1, "phrase": "red car",
                      "iscrowd": 0, "width": 640, "height": 480, "length": 250, "score": 0.9,
                      "segmentations": [null, {"size": [480, 640], "counts": ...}, ...],
                      "bboxes": [null, [x, y, w, h], ...], "areas": [null, 1234, ...],
                      "scores": [null, 0.9, ...], "tracker_scores": [null, 0.87, ...]}]}

An annotation's ``id`` is the object's. Its ``score`` is the mean of ``scores``, which are those of
the detection that the object came of: one value, but for frames before and after a click, which
makes it 1. ``tracker_scores`` are how sure the tracker is of the object, frame by frame. Lists have
one entry a frame, null where the object is not, and in ``tracker_scores`` for results from before
these were written. ``file_names`` is there for folders of pictures, ``errors`` names frames that
could not be read.

Results come by frame and are wanted by object. The turn is made on the disk, in a temporary SQLite
file beside the output, so that hours of video need no more memory than seconds.
"""

from __future__ import annotations

import contextlib
import errno
import json
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from sam3_jax.inference.files import replacing
from sam3_jax.inference.records import SCHEMA_VERSION
from sam3_jax.video.results import Recorded, read_results

_LISTS = {
    "segmentations": "segmentation",
    "bboxes": "bbox",
    "areas": "area",
    "scores": "score",
    "tracker_scores": "tracker_score",
}


def merge_tracks(
    results: Path,
    path: Path,
    *,
    phrases: Iterable[str] = (),
    frame_names: Iterable[str] | None = None,
) -> Path:
    """Makes ``path`` of the frames in ``results``; replaces it at the end.

    Args:
      results: a file of ``results.py``.
      phrases: categories that come first, found or not; others as they first appear.
      frame_names: of a folder's pictures.

    Raises:
      UsageError: when there are no results.
      OSError: when the file cannot be written.
    """
    recorded = read_results(results)
    with replacing(path) as temporary, _spool(path) as table:
        facts = _fill(table, recorded)
        video = {"id": 1, **_video(recorded), **facts}
        if frame_names is not None:
            video["file_names"] = list(frame_names)[: recorded.length]
        found = (row[0] for row in table.execute("SELECT phrase FROM object ORDER BY first, id"))
        categories = {name: i for i, name in enumerate(dict.fromkeys([*phrases, *found]), start=1)}
        with temporary.open("w", encoding="utf-8") as out:
            info = json.dumps(recorded.run)
            out.write(f'{{"schema_version": {SCHEMA_VERSION}, "info": {info},\n')
            out.write(f'"videos": [{json.dumps(video)}],\n"categories": ')
            json.dump([{"id": i, "name": name} for name, i in categories.items()], out)
            out.write(',\n"annotations": [')
            _write_annotations(out, table, video, categories)
            out.write("]}\n")
    return path


def is_merged(path: Path, run: dict[str, Any]) -> bool:
    """Whether ``path`` is a finished file of a run with these settings; reads its first line."""
    try:
        with path.open(encoding="utf-8") as file:
            info = json.loads(file.readline().rstrip(",\n") + "}")["info"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
    info.pop("video", None)
    return info == json.loads(json.dumps(run))


@contextlib.contextmanager
def _spool(path: Path) -> Iterator[sqlite3.Connection]:
    """An empty table of what was found, on the disk; gone at the end."""
    file = path.with_name(f".{path.name}.sqlite.tmp")
    file.unlink(missing_ok=True)
    try:
        with contextlib.closing(sqlite3.connect(file)) as table:
            # It can be made again: no journal, no waiting for the disk.
            table.execute("PRAGMA journal_mode = OFF")
            table.execute("PRAGMA synchronous = OFF")
            columns = ", ".join(_LISTS.values())
            table.execute(
                f"CREATE TABLE entry (id INTEGER, frame INTEGER, {columns}, "
                "PRIMARY KEY (id, frame)) WITHOUT ROWID"
            )
            table.execute("CREATE TABLE object (id INTEGER PRIMARY KEY, first INTEGER, phrase)")
            yield table
    except sqlite3.Error as error:
        raise OSError(errno.EIO, f"cannot make the tracks: {error}", str(path)) from error
    finally:
        file.unlink(missing_ok=True)


def _fill(table: sqlite3.Connection, recorded: Recorded) -> dict[str, Any]:
    """Puts all entries into the table; what the frames have to tell about the video."""
    times: list[float | None] = [None] * recorded.length
    errors: dict[str, str] = {}
    insert = f"INSERT INTO entry VALUES (?, ?{', ?' * len(_LISTS)})"
    for record in recorded.frames():
        frame = record["frame"]
        times[frame] = record["time"]
        if record["error"] is not None:
            errors[str(frame)] = record["error"]
        for item in record["objects"]:
            item = {"tracker_score": None, **item}  # older results lack it
            values = (json.dumps(item[name]) for name in _LISTS.values())
            table.execute(insert, (item["id"], frame, *values))
            known = (item["id"], frame, item["phrase"])
            table.execute("INSERT OR IGNORE INTO object VALUES (?, ?, ?)", known)
    table.commit()
    return {"length": recorded.length, "times": times, "errors": errors}


def _video(recorded: Recorded) -> dict[str, Any]:
    facts = recorded.run["video"]
    names = {"file_name": facts["name"], "width": facts["width"], "height": facts["height"]}
    return {**names, "fps": facts["fps"]}


def _write_annotations(
    out: TextIO, table: sqlite3.Connection, video: dict[str, Any], categories: dict[str, int]
) -> None:
    size = {name: video[name] for name in ("width", "height", "length")}
    objects = table.execute("SELECT id, phrase FROM object ORDER BY id")
    for place, (number, phrase) in enumerate(objects):
        (score,) = table.execute(
            "SELECT AVG(CAST(score AS REAL)) FROM entry WHERE id = ?", (number,)
        ).fetchone()
        fields = {
            "id": number,
            "video_id": video["id"],
            "category_id": categories[phrase],
            "phrase": phrase,
            "iscrowd": 0,
            **size,
            "score": round(score, 6),
        }
        out.write(f"{',' if place else ''}\n{json.dumps(fields)[:-1]}")
        for name, column in _LISTS.items():
            out.write(f',\n"{name}": [')
            rows = table.execute(
                f"SELECT frame, {column} FROM entry WHERE id = ? ORDER BY frame", (number,)
            )
            _write_list(out, rows, video["length"])
            out.write("]")
        out.write("}")


def _write_list(out: TextIO, rows: Iterable[tuple[int, str]], length: int) -> None:
    """One JSON value for each frame, null for those without a row."""
    written = 0
    for frame, value in rows:
        out.write("null, " * (frame - written) + value + (", " if frame < length - 1 else ""))
        written = frame + 1
    out.write(", ".join(["null"] * (length - written)))
