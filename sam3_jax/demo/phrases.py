"""What can be asked about a picture, and which objects answer it.

A query names any of size, colour, texture and shape: "small red ring", "striped triangle",
"seven", "blue object". Its answer is every object that has all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from sam3_jax.demo.objects import (
    COLORS,
    DIGITS,
    PLAIN,
    SHAPES,
    SIZES,
    TEXTURES,
    UNSEEN,
    Object,
)

# Attributes that a query names, and how often it is of that kind.
KINDS: dict[tuple[str, ...], float] = {
    ("shape",): 0.24,
    ("color", "shape"): 0.32,
    ("texture", "shape"): 0.14,
    ("size", "shape"): 0.10,
    ("size", "color", "shape"): 0.12,
    ("color",): 0.08,
}
VALUES = {
    "size": tuple(SIZES),
    "color": tuple(COLORS),
    "texture": TEXTURES,
    "shape": SHAPES + DIGITS,  # digits have no texture
}
TRIES = 40  # draws for each phrase; a picture may have fewer different ones
LIKELY = 0.75  # of the changed words are words for something else in the picture
EMPTY_DIGITS = 0.2  # of the shapes that are asked about an empty picture


Words = Sequence[tuple[str, float]]


class Query(NamedTuple):
    """A noun phrase by its parts; None: not mentioned."""

    size: str | None = None
    color: str | None = None
    texture: str | None = None
    shape: str | None = None

    @property
    def text(self) -> str:
        """The phrase."""
        words = (self.size, self.color, self.texture, self.shape or "object")
        return " ".join(word for word in words if word)

    @property
    def is_unseen(self) -> bool:
        """Whether it names a pair that training must not mention."""
        return (self.color, self.shape) in UNSEEN

    def answers(self, objects: Sequence[Object]) -> tuple[int, ...]:
        """Indices of all objects that it means."""
        wanted = [(name, value) for name, value in self._asdict().items() if value is not None]
        return tuple(
            number
            for number, obj in enumerate(objects)
            if all(getattr(obj, name) == value for name, value in wanted)
        )


def draw_queries(
    objects: Sequence[Object],
    positives: int,
    negatives: int,
    hard: float,
    rng: np.random.Generator,
    words: Words = (),
) -> list[Query]:
    """Different queries without unseen pairs: first those with an answer, then those without.

    Negatives are made of the positives by changing words, so that a phrase's form says nothing
    about its answer.

    Args:
      objects: of the picture.
      positives: how many name something that is there; fewer where there is less to name.
      negatives: how many name nothing that is there.
      hard: of the negatives, the share that differs in one word from a positive.
      rng: chance.
      words: attributes and the shares of the phrases that name nothing else.
    """

    def absent(query: Query) -> bool:
        return not query.answers(objects)

    there = _fresh(lambda: _about(objects, rng, words), positives if objects else 0, lambda _: True)
    near = _fresh(
        lambda: _near(_pick(there, rng), objects, rng),
        round(hard * negatives) if there else 0,
        absent,
    )
    far = _fresh(
        lambda: _far(_pick(there, rng) if there else _example(rng, words), rng),
        negatives - len(near),
        lambda query: absent(query) and query not in near,
    )
    return there + near + far


def _fresh(
    draw: Callable[[], Query | None], count: int, right: Callable[[Query], bool]
) -> list[Query]:
    """Up to ``count`` different queries that are ``right`` and may be asked."""
    chosen: list[Query] = []
    for _ in range(TRIES * count):
        if len(chosen) == count:
            break
        query = draw()
        if query and not query.is_unseen and query not in chosen and right(query):
            chosen.append(query)
    return chosen


def unseen_queries(
    objects: Sequence[Object], positives: int, negatives: int, rng: np.random.Generator
) -> list[Query]:
    """Queries about unseen pairs alone; of the absent ones, first those whose parts are there."""
    colors, shapes = {o.color for o in objects}, {o.shape for o in objects}
    pairs = sorted(UNSEEN)
    queries = [Query(color=c, shape=s) for c, s in (pairs[i] for i in rng.permutation(len(pairs)))]
    there = [query for query in queries if query.answers(objects)]
    absent = [query for query in queries if not query.answers(objects)]
    absent.sort(key=lambda query: -((query.color in colors) + (query.shape in shapes)))
    return there[:positives] + absent[:negatives]


def _about(objects: Sequence[Object], rng: np.random.Generator, words: Words) -> Query | None:
    """Says something about one of the objects; None: there is no such thing to say."""
    kind = _kind(rng, words)
    if "texture" in kind:  # nobody says "plain"
        objects = [obj for obj in objects if obj.texture != PLAIN]
    if not objects:
        return None
    obj = _pick(objects, rng)
    return Query(**{name: getattr(obj, name) for name in kind})


def _near(query: Query, objects: Sequence[Object], rng: np.random.Generator) -> Query | None:
    """The query with one word changed, mostly to one for something else in the picture."""
    words = _words(query)
    changed = _pick(list(words), rng)
    others = _alternatives(changed, words[changed])
    if rng.random() < LIKELY:
        others = [value for value in others if any(getattr(o, changed) == value for o in objects)]
    return query._replace(**{changed: _pick(others, rng)}) if others else None


def _far(query: Query, rng: np.random.Generator) -> Query:
    """A query of the same form with other words."""
    words = _words(query)
    return Query(**{name: _pick(_alternatives(name, words[name]), rng) for name in words})


def _example(rng: np.random.Generator, words: Words) -> Query:
    """Any query, for a picture of nothing."""
    values = {name: VALUES[name][0] for name in _kind(rng, words)}
    if "shape" in values and "texture" not in values and rng.random() < EMPTY_DIGITS:
        values["shape"] = DIGITS[0]
    return Query(**values)


def _words(query: Query) -> dict[str, str]:
    return {name: value for name, value in query._asdict().items() if value is not None}


def _alternatives(name: str, value: str) -> list[str]:
    """Other words for an attribute; a digit's are digits: only they have no texture."""
    family = VALUES[name] if name != "shape" else DIGITS if value in DIGITS else SHAPES
    return [other for other in family if other != value]


def _kind(rng: np.random.Generator, words: Words) -> tuple[str, ...]:
    kinds = KINDS
    if words and rng.random() < sum(share for _, share in words):
        kinds = {(name,): share for name, share in words}
    total = np.cumsum(list(kinds.values()))
    return list(kinds)[int(np.searchsorted(total, rng.random() * total[-1], side="right"))]


def _pick(items: Sequence, rng: np.random.Generator):
    return items[int(rng.integers(len(items)))]
