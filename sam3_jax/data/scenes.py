"""What training examples are drawn from: pictures with all that is known about their phrases.

A training record is (picture, phrase, targets). Those of one picture are kept together, so that
its file is stored and decoded once however many phrases it has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from sam3_jax.data.records import Dataset, Instance, Picture, Record
from sam3_jax.tokenizer import clean

_WORDS = re.compile(r"\w+")
# Words that say nothing about what a phrase means.
_EMPTY_WORDS = frozenset("a an and at by for from in of on or the to with".split())


class Pair(NamedTuple):
    """A phrase and its targets in one picture; no instances: see ``exhaustive``."""

    phrase: str
    pair_id: str  # ids of the annotation file, joined by "/"
    instances: tuple[Instance, ...]
    exhaustive: bool  # all instances are there; with none, the phrase is not in the picture
    pixel_exhaustive: bool


class Scene(NamedTuple):
    """One picture with every phrase that is annotated in it."""

    picture: Picture
    pairs: tuple[Pair, ...]
    data: bytes = b""  # the image file


class Vocabulary(NamedTuple):
    """The fixed list of phrases of a data set.

    ``closed``: there is one, and every picture was searched for each of them, so that a phrase
    without a pair is a negative. Otherwise (SA-Co) only the pairs say what is not in a picture,
    and there are no ``phrases``.
    """

    phrases: tuple[str, ...]
    groups: tuple[str, ...]  # supercategories
    closed: bool

    def hard(self, present: Iterable[str]) -> frozenset[str]:
        """Phrases that share the group or a word with one of those ``present``."""
        present = {clean(phrase) for phrase in present}
        names = [clean(phrase) for phrase in self.phrases]
        known = [name in present for name in names]
        groups = {group for group, there in zip(self.groups, known, strict=True) if there and group}
        words = set().union(*map(content_words, present))
        return frozenset(
            phrase
            for phrase, name, group in zip(self.phrases, names, self.groups, strict=True)
            if name not in present and (group in groups or content_words(name) & words)
        )


def content_words(phrase: str) -> frozenset[str]:
    """Lower-case words of a phrase that carry meaning."""
    return frozenset(_WORDS.findall(phrase.lower())) - _EMPTY_WORDS


def scenes_of(dataset: Dataset) -> list[Scene]:
    """Groups a data set's pairs by picture, in the order of the file; without the image files.

    Phrases that the model cannot tell apart (case, spaces) become one pair with all instances.
    Pairs that give their picture another size than its first are added to ``dataset.problems``.
    """
    by_id = dataset.layout == "coco"  # SA-Co's images are pairs: one picture has several ids
    pictures: dict[int | str, Picture] = {}
    for picture in dataset.pictures:
        pictures.setdefault(picture.image_id if by_id else picture.file_name, picture)
    records: dict[int | str, list[Record]] = {key: [] for key in pictures}
    for record in dataset.records:
        key = record.image_id if by_id else record.file_name
        if record.size == pictures[key].size:
            records[key].append(record)
        else:
            kind = "another size than in other pairs of the picture"
            dataset.problems.add(kind, f"image {record.image_id}")
    return [Scene(pictures[key], _merge(found)) for key, found in records.items()]


def vocabulary_of(dataset: Dataset) -> Vocabulary:
    """The data set's fixed phrases, each once, in the order of the file."""
    groups: dict[str, tuple[str, str]] = {}
    for category in dataset.categories.values():
        groups.setdefault(clean(category.phrase), (category.phrase, category.group))
    phrases = tuple(phrase for phrase, _ in groups.values())
    return Vocabulary(phrases, tuple(g for _, g in groups.values()), dataset.layout == "coco")


def _merge(records: list[Record]) -> tuple[Pair, ...]:
    pairs: dict[str, Pair] = {}
    for record in records:
        (answer,) = record.answers
        pair = Pair(
            record.phrase,
            "/".join(map(str, record.key)),
            answer.instances,
            answer.exhaustive,
            answer.pixel_exhaustive,
        )
        same = pairs.get(clean(record.phrase))
        pairs[clean(record.phrase)] = pair if same is None else _union(same, pair)
    return tuple(pairs.values())


def _union(a: Pair, b: Pair) -> Pair:
    return Pair(
        a.phrase,
        f"{a.pair_id}+{b.pair_id}",
        a.instances + b.instances,
        a.exhaustive and b.exhaustive,
        a.pixel_exhaustive and b.pixel_exhaustive,
    )
