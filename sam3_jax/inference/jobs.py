"""The work list: one picture or video and its prompts a job; and the file that holds many of them.

A job file is JSON lines in UTF-8: one object a line, blank lines and lines that start with ``#``
are skipped. For example::

    # two phrases; exemplar boxes with a phrase; boxes alone; clicks; a box around one object
    {"image": "a.jpg", "phrases": ["cat", "red car"], "threshold": 0.4}
    {"image": "b.jpg", "phrases": ["bottle"], "boxes": [[9, 8, 60, 90]], "box_labels": [0]}
    {"image": "c.jpg", "boxes": [[120, 80, 260, 310], [5, 5, 40, 70]]}
    {"image": "d.jpg", "points": [[320, 200], [10, 10]], "point_labels": [1, 0]}
    {"image": "sub/e.png", "object_box": [30, 20, 400, 300], "schema_version": 1}
    {"image": "clip.mp4", "points": [[320, 200]], "frame": 12}

Keys of a line:

- ``image`` (required): path of a picture, a video, or a folder with a video's frames; a relative
  one starts at the folder of the job file.
- ``phrases``: list of texts, each searched for by itself.
- ``boxes``: list of [x0, y0, x1, y1], exemplars that go with every phrase, or stand alone.
- ``box_labels``: for each box 1 ("like this", the default) or 0 ("not like this").
- ``threshold``: 0..1, keep instances scored above it; default: that of the run. Of pictures: a
  video with one fails.
- ``points``: list of [x, y] on one object; ``point_labels``: 1 on it (default), 0 not on it.
- ``object_box``: [x0, y0, x1, y1] around one object.
- ``mask_prompt``: path of a mask of the object to start from; relative as ``image`` is.
- ``frame``: of a video, that which boxes, points and the mask are on (default: the first).
- ``schema_version``: 1, the version described here; a line without it is read as version 1. It
  stands on lines rather than in a header, so that job files can be split and concatenated.

Coordinates are pixels of the upright picture. The first five keys make a *concept* prompt (every
instance), the others an *object* prompt (one instance); a line has one kind. A line that repeats
an earlier one is left out.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sam3_jax.inference.files import SUFFIXES, UsageError

SCHEMA_VERSION = 1
SHOWN = 200  # characters of a bad line that are kept
Box = tuple[float, float, float, float]
Values = Any  # as they come from a file or a caller: checked here


class JobError(ValueError):
    """A picture's prompts cannot be used; the message says what is wrong and what to do."""


class Job(NamedTuple):
    """One picture and what to find in it; :func:`make_job` checks and makes them.

    ``key`` identifies the job across restarts: the path as it was given and a digest of the
    prompts. Two jobs with one key are the same job.
    """

    image: Path
    key: str
    phrases: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()  # (x0, y0, x1, y1) in pixels
    box_labels: tuple[int, ...] = ()
    points: tuple[tuple[float, float], ...] = ()
    point_labels: tuple[int, ...] = ()
    object_box: Box | None = None
    mask_prompt: Path | None = None
    threshold: float | None = None
    frame: int | None = None  # of a video: where boxes, points and the mask are; None: the first

    @property
    def about_object(self) -> bool:
        """Whether this is an object prompt (one instance) rather than a concept."""
        return bool(self.points or self.object_box or self.mask_prompt)

    @property
    def names(self) -> tuple[str, ...]:
        """What results call the prompts: the phrases, "visual" for boxes alone, or "object"."""
        return ("object",) if self.about_object else self.phrases or ("visual",)


class BadLine(NamedTuple):
    """A line of a job file that cannot be used."""

    number: int  # counted from 1
    text: str  # its beginning
    error: str


class Share(NamedTuple):
    """Which part of the jobs is this process's: every ``processes``-th, from ``process`` on."""

    process: int = 0
    processes: int = 1


def make_job(
    image: Values,
    *,
    phrases: Values = (),
    boxes: Values = (),
    box_labels: Values | None = None,
    points: Values = (),
    point_labels: Values | None = None,
    object_box: Values | None = None,
    mask_prompt: Values | None = None,
    threshold: Values | None = None,
    frame: Values | None = None,
    folder: Path | None = None,
) -> Job:
    """Checks the prompts of one picture; for the arguments see the module's docstring.

    Args:
      folder: where relative paths start; None: the current folder.

    Raises:
      JobError: on values that cannot be used, on both kinds of prompt at once, and on none.
    """
    start = folder or Path()
    given = _path(image, "image")
    mask = None if mask_prompt is None else _path(mask_prompt, "mask_prompt")
    exemplars = _rows(boxes, "boxes", "x0, y0, x1, y1")
    clicks = _rows(points, "points", "x, y")
    job = Job(
        image=start / given,
        key="",
        phrases=_phrases(phrases),
        boxes=tuple(_ordered(box, "boxes") for box in exemplars),
        box_labels=_labels(box_labels, len(exemplars), "box_labels", "boxes"),
        points=clicks,
        point_labels=_labels(point_labels, len(clicks), "point_labels", "points"),
        object_box=None if object_box is None else _object_box(object_box),
        mask_prompt=None if mask is None else start / mask,
        threshold=None if threshold is None else _threshold(threshold),
        frame=None if frame is None else _frame(frame, given),
    )
    if job.about_object and (job.phrases or job.boxes or threshold is not None):
        raise JobError(
            "phrases, boxes and threshold look for every instance of a concept; points, "
            "object_box and mask_prompt for one object: use one kind, or two jobs"
        )
    if not (job.about_object or job.phrases or job.boxes):
        raise JobError(
            'no prompt: give phrases such as ["cat"], boxes, points, an object_box or a mask_prompt'
        )
    mask_given = None if mask is None else mask.as_posix()
    where = [] if job.frame is None else [job.frame]
    prompts = json.dumps([*job[2:8], mask_given, job.threshold, *where])
    digest = hashlib.sha256(prompts.encode()).hexdigest()[:12]
    return job._replace(key=f"{given.as_posix()}#{digest}")


def read_jobs(path: Path) -> Iterator[Job | BadLine]:
    """The jobs of a job file in its order; a line that cannot be used gives a :class:`BadLine`.

    Reads as it goes, so the file may be larger than memory but for the keys.

    Raises:
      UsageError: when the file cannot be read.
    """
    seen = set()
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                found = _read_line(line.removeprefix(b"\xef\xbb\xbf").strip(), number, path.parent)
                if isinstance(found, BadLine):
                    yield found
                elif found and found.key not in seen:
                    seen.add(found.key)
                    yield found
    except OSError as error:
        raise UsageError(f"cannot read the job file {path}: {error.strerror}") from error


def _read_line(line: bytes, number: int, folder: Path) -> Job | BadLine | None:
    """The job of one line; None where there is none."""
    if not line or line.startswith(b"#"):
        return None
    try:
        return _parse(line.decode("utf-8"), folder)
    except UnicodeDecodeError as error:
        byte = f"byte {line[error.start]:#x} at {error.start + 1}"
        message = f"not UTF-8 ({byte}): save the file as UTF-8"
    except json.JSONDecodeError as error:
        message = f"not a JSON object: {error.msg} at character {error.pos + 1}"
    except RecursionError:
        message = "not a job: nested too deeply"
    except ValueError as error:
        message = str(error)
    return BadLine(number, line.decode("utf-8", "replace")[:SHOWN], message)


def _parse(text: str, folder: Path) -> Job:
    fields = json.loads(text, object_pairs_hook=_unique)
    if not isinstance(fields, dict):
        raise JobError('not a JSON object: write {"image": "a.jpg", "phrases": ["cat"]}')
    version = fields.pop("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise JobError(f"schema_version is {version!r}, this program reads {SCHEMA_VERSION}")
    known = [name for name in Job._fields if name != "key"]
    for name in fields.keys() - set(known):
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
        raise JobError(f"unknown key {name!r}: {hint}")
    if "image" not in fields:
        raise JobError('no "image": give the path of the picture')
    # null is "not given", as in the files of other programs
    return make_job(folder=folder, **{k: v for k, v in fields.items() if v is not None})


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        twice = next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))
        raise JobError(f"the key {twice!r} is there twice")
    return fields


def _path(value: Values, name: str) -> Path:
    if not isinstance(value, str | Path) or not str(value).strip() or "\0" in str(value):
        raise JobError(f"{name} must be a path, got {value!r}")
    return Path(value)


def _phrases(values: Values) -> tuple[str, ...]:
    """Phrases without repetitions."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise JobError(f'phrases must be a list of texts such as ["cat"], got {values!r}')
    for phrase in values:
        if not isinstance(phrase, str) or not phrase.strip():
            raise JobError(f"phrases has {phrase!r}: each must be a text such as 'red car'")
    return tuple(dict.fromkeys(values))


def _row(value: Values, name: str, form: str) -> tuple[float, ...]:
    """A sequence of finite numbers, as many as ``form`` names."""
    try:
        if isinstance(value, str) or any(isinstance(v, str | bool) for v in value):
            raise TypeError
        numbers = tuple(float(v) for v in value)
    except (TypeError, ValueError, OverflowError):
        numbers = ()
    if len(numbers) != len(form.split(",")) or not all(map(math.isfinite, numbers)):
        raise JobError(f"{name}: {value!r} is not [{form}] in pixels")
    return numbers


def _rows(values: Values, name: str, form: str) -> tuple[tuple[float, ...], ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise JobError(f"{name} must be a list of [{form}], got {values!r}")
    return tuple(_row(value, name, form) for value in values)


def _ordered(box: Box, name: str) -> Box:
    x0, y0, x1, y1 = box
    if x0 >= x1 or y0 >= y1:
        raise JobError(f"{name}: {list(box)} must have x0 < x1 and y0 < y1")
    return box


def _object_box(value: Values) -> Box:
    return _ordered(_row(value, "object_box", "x0, y0, x1, y1"), "object_box")


def _labels(values: Values, n: int, name: str, of: str) -> tuple[int, ...]:
    """``n`` labels, all 1 where none are given."""
    if values is None:
        return (1,) * n
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != n:
        raise JobError(f"{name} must be a list of {n} values, one for each of {of}: {values!r}")
    if any(type(v) is not int or v not in (0, 1) for v in values):
        raise JobError(f"{name} must be 1 (like this) or 0 (not like this), got {values!r}")
    return tuple(values)


def _threshold(value: Values) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:
        raise JobError(f"threshold must be a number from 0 to 1, got {value!r}")
    return float(value)


def _frame(value: Values, image: Path) -> int:
    if type(value) is not int or value < 0:
        raise JobError(f"frame must be a whole number, 0 or more, got {value!r}")
    if image.suffix.lower() in SUFFIXES:
        raise JobError(f"frame is of videos, {image} is a picture")
    return value
