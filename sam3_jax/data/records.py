"""Annotations in memory: image-phrase pairs with the answers of one or more annotators."""

from __future__ import annotations

from typing import Any, NamedTuple

Key = tuple[int | str, ...]  # (pair id,) in SA-Co files, (image id, category id) in COCO files
SHOWN = 8  # ids of each kind of problem that a message lists; the JSON report has all


class AnnotationError(Exception):
    """A file that cannot be used; the message says which, why, and what to do."""


class Instance(NamedTuple):
    """One object, annotated or predicted."""

    box: tuple[float, float, float, float]  # (x, y, width, height), pixels
    rle: dict[str, Any] | None  # compressed run lengths at the image's size; None: a box only
    area: float  # pixels
    crowd: bool = False  # several objects in one mask: nothing has to be found there
    score: float = 1.0
    id: int | str | None = None  # the annotation's in its file


class Picture(NamedTuple):
    """An image of a data set, with or without annotations."""

    image_id: int | str
    file_name: str
    size: tuple[int, int]  # (height, width)


class Category(NamedTuple):
    """One of a fixed list of phrases."""

    phrase: str
    group: str  # the supercategory; empty: none


class Answer(NamedTuple):
    """What one annotator says about a pair; no instances: the phrase is not in the image."""

    instances: tuple[Instance, ...]
    exhaustive: bool  # every instance is there, each by itself
    pixel_exhaustive: bool  # the masks together cover everything the phrase names


class Record(NamedTuple):
    """An image and a phrase."""

    key: Key
    image_id: int | str
    category_id: int | str
    file_name: str
    size: tuple[int, int]  # (height, width)
    phrase: str
    answers: tuple[Answer, ...]  # one an annotator

    @property
    def exhaustive(self) -> bool:
        """Whether all annotators found all instances: only then can a prediction be wrong."""
        return all(answer.exhaustive for answer in self.answers)


class Problems:
    """Entries of a file that cannot be used: counted, kept by id, and bounded in number."""

    def __init__(self):
        self.found: dict[str, list[str]] = {}

    def add(self, kind: str, what: str) -> None:
        """Notes one entry; ``kind`` is a short description, ``what`` identifies the entry."""
        self.found.setdefault(kind, []).append(what)

    def lines(self) -> list[str]:
        """One line a kind: how many, and the first few."""
        lines = []
        for kind, entries in self.found.items():
            more = f" and {len(entries) - SHOWN} more" if len(entries) > SHOWN else ""
            lines.append(f"{kind}: {len(entries)} ({', '.join(entries[:SHOWN])}{more})")
        return lines

    def check(self, source: str, total: int, limit: float) -> None:
        """Refuses a file in which too much is bad.

        Raises:
          AnnotationError: when more than the share ``limit`` of ``total`` entries have problems.
        """
        bad = sum(map(len, self.found.values()))
        if bad > limit * total:
            details = "\n  ".join(self.lines())
            raise AnnotationError(
                f"{source}: {bad} of {total} entries cannot be used, more than the "
                f"{limit:.1%} allowed; mend the file, or allow a larger share\n  {details}"
            )


class Dataset(NamedTuple):
    """All pairs of one or more annotation files."""

    layout: str  # "saco": a phrase a pair; "coco": a fixed list of categories
    records: list[Record]
    has_masks: bool
    problems: Problems
    sources: list[str]  # the files
    pictures: list[Picture]  # of COCO layouts all usable images; of SA-Co one a pair
    categories: dict[int | str, Category]  # of COCO layouts; of SA-Co none
