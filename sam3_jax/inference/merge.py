"""All parts of a run as one COCO file, and which pictures are done; see ``records.py``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from sam3_jax.inference.files import UsageError, replacing
from sam3_jax.inference.records import MERGED, PARTS, SCHEMA_VERSION, check_run, read_run

_IMAGE_FIELDS = "file_name width height status error phrases outputs seconds key".split()


def read_done(folder: Path) -> set[str]:
    """Keys of the pictures that need not be done again; none without results.

    Raises:
      UsageError: when a part is of another kind or version.
    """
    return {key for key, entry in _entries(folder).items() if entry.ok}


def merge(folder: Path) -> Path:
    """Makes ``results.json`` of all parts and returns its path.

    Pictures are in the order of the work list. Categories are the run's "phrases" if it has them,
    then others as they first appear. Reads the parts twice and keeps a line for each picture, never
    its masks; a ``results.json`` that is there is replaced at the end.

    Raises:
      UsageError: when there are no parts, or parts of different runs.
      OSError: when the file cannot be written.
    """
    parts = sorted(folder.glob(PARTS))
    runs = [run for run in map(read_run, parts) if run is not None]
    if not runs:
        raise UsageError(f"no results in {folder}: there is no {PARTS} with a complete line")
    for part in parts:
        check_run(part, runs[0])
    entries = sorted(_entries(folder).items(), key=lambda item: (item[1].index, item[0]))
    names = dict.fromkeys(runs[0].get("phrases", ()))
    for _, entry in entries:
        names.update(dict.fromkeys(entry.phrases))
    categories = {name: i for i, name in enumerate(names, start=1)}
    with replacing(folder / MERGED) as temporary, temporary.open("w", encoding="utf-8") as out:
        out.write(f'{{"schema_version": {SCHEMA_VERSION}, "info": {json.dumps(runs[0])},\n')
        images = (f'{{"id": {i}, {entry.image[1:]}' for i, (_, entry) in enumerate(entries, 1))
        _write_list(out, "images", images)
        listed = ({"id": i, "name": name} for name, i in categories.items())
        _write_list(out, "categories", map(json.dumps, listed))
        _write_list(out, "annotations", _annotations([e for _, e in entries], categories), end="}")
    return folder / MERGED


class _Entry(NamedTuple):
    """What is kept of a record."""

    ok: bool
    index: int
    part: Path
    offset: int  # of its line in the part
    length: int
    image: str  # JSON of what is merged about the image
    phrases: tuple[str, ...]


def _entries(folder: Path) -> dict[str, _Entry]:
    """The record that counts of every key."""
    chosen: dict[str, _Entry] = {}
    known: dict[tuple[str, ...], tuple[str, ...]] = {}  # most pictures have the same phrases
    for part in sorted(folder.glob(PARTS)):
        read_run(part)
        latest: dict[str, _Entry] = {}
        for offset, length, record in _records(part):
            image = {name: record.get(name) for name in _IMAGE_FIELDS}
            if image["status"] == "ok":
                del image["error"]
            found = (item["phrase"] for item in record["annotations"])
            phrases = tuple(dict.fromkeys([*record["phrases"], *found]))
            latest[record["key"]] = _Entry(
                ok=record["status"] == "ok",
                index=record["index"],
                part=part,
                offset=offset,
                length=length,
                image=json.dumps(image),
                phrases=known.setdefault(phrases, phrases),
            )
        for key, entry in latest.items():
            if entry.ok or key not in chosen or not chosen[key].ok:
                chosen[key] = entry
    return chosen


def _records(part: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Offset, length and content of every record; what is torn or damaged counts as not there."""
    offset = 0
    with part.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:  # a disk without power can leave zeros
                record = None
            if isinstance(record, dict) and "key" in record:
                yield offset, len(line), record
            offset += len(line)


def _annotations(entries: Sequence[_Entry], categories: dict[str, int]) -> Iterator[str]:
    """The second pass: JSON of every annotation, numbered from 1."""
    number, files = 0, {}
    try:
        for image_id, entry in enumerate(entries, start=1):
            if entry.part not in files:
                files[entry.part] = entry.part.open("rb")
            files[entry.part].seek(entry.offset)
            for item in json.loads(files[entry.part].read(entry.length))["annotations"]:
                number += 1
                ids = {"id": number, "image_id": image_id}
                ids["category_id"] = categories[item.pop("phrase")]
                yield json.dumps({**ids, "iscrowd": 0, **item})
    finally:
        for file in files.values():
            file.close()


def _write_list(out: TextIO, name: str, items: Iterator[str], end: str = ",") -> None:
    out.write(f'"{name}": [')
    for i, item in enumerate(items):
        out.write(f",\n{item}" if i else f"\n{item}")
    out.write(f"]{end}\n")
