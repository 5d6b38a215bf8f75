"""Which objects a picture has, and where they lie.

A picture draws from a few colours and shapes of its own, so that there are several of a kind and
hardly an object without a neighbour that shares a word with it. Nobody is hidden: what would cover
too much of another object goes elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sam3_jax.demo.digits import samples_of
from sam3_jax.demo.objects import (
    BASE_SIDE,
    COLORS,
    DIGIT_SIZES,
    DIGITS,
    PLAIN,
    SHAPES,
    SIZES,
    TEXTURES,
    THIN,
    UNSEEN,
    Object,
)
from sam3_jax.demo.render import stamp, window

MAX_TILT = {"square": math.pi / 4, "triangle": math.pi / 3, "heart": math.pi / 6}
DIGIT_TILT = math.pi / 15
PLACES = 30  # that are tried for an object before it is left out


@dataclass(frozen=True)
class SceneConfig:
    """Pictures of the demo. Lengths are those of a picture of 256 pixels and scale with ``side``.

    A ``view`` below 256 is a close-up: the picture shows so many of these pixels, with ``side`` of
    its own. The shares of pictures with no, few and many objects are fixed: see
    :func:`draw_count`.
    """

    side: int = BASE_SIDE
    view: int = BASE_SIDE
    max_objects: int = 30
    digits: float = 0.55  # share of the pictures with digits
    textured: float = 0.5  # share of the objects with a texture, where they can have one
    visible: float = 0.7  # least share of an object that is seen
    visible_digit: float = 0.85  # of a digit: half a seven is a one
    min_pixels: int = 80  # least number of them
    positives: int = 6  # phrases of a picture
    negatives: int = 6
    hard: float = 0.7  # share of the negatives that differ in one word from what is there
    # Attributes, and the shares of the phrases that name nothing else.
    words: tuple[tuple[str, float], ...] = ()


def draw_count(config: SceneConfig, rng: np.random.Generator) -> int:
    """How many objects to place: 2% none, 80% 1 to 12, the rest 13 to ``max_objects``."""
    kind, share = rng.random(2)
    if kind < 0.02:
        return 0
    if kind < 0.82:
        return 1 + int(share * min(12, config.max_objects))
    return min(13 + int(share * (config.max_objects - 12)), config.max_objects)


def draw_objects(
    config: SceneConfig, rng: np.random.Generator, *, held_out: bool, unseen: bool
) -> tuple[Object, ...]:
    """The objects of one picture, from bottom to top.

    Args:
      config: of the picture.
      rng: chance.
      held_out: digits by the writers that training does not see.
      unseen: with colour-shape pairs that training does not see; otherwise without any of them.
    """
    count = draw_count(config, rng)
    pairs = _unseen_pairs(rng) if unseen else _seen_pairs(config, rng)
    if unseen:
        count = max(count, 4)
    small = 0.5 if count <= 8 else 0.7 if count <= 14 else 0.92
    placed: list[Object] = []
    scene = _Canvas(config)
    for number in range(count):
        # The first two are of different unseen pairs: there is something to find.
        chosen = number if unseen and number < 2 else int(rng.integers(len(pairs)))
        color, shape = pairs[chosen]
        obj = _draw_object(color, shape, small, config, rng, held_out=held_out)
        spot = scene.place(obj, rng)
        if spot is not None:
            placed.append(spot)
    return tuple(placed)


def _seen_pairs(config: SceneConfig, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Pairs of a few colours with a few shapes, and maybe digits."""
    colors = _some(tuple(COLORS), 2, 6, rng)
    shapes = _some(SHAPES, 2, 5, rng)
    if rng.random() < config.digits:
        shapes += _some(DIGITS, 1, 4, rng)
    pairs = [(color, shape) for color in colors for shape in shapes]
    return [pair for pair in pairs if pair not in UNSEEN]


def _unseen_pairs(rng: np.random.Generator) -> list[tuple[str, str]]:
    """Two or three unseen pairs, and as often seen ones that share a word with unseen pairs.

    Of those, some belong to unseen pairs that the picture does not show: the hard negatives.
    """
    hidden = sorted(UNSEEN)
    order = [hidden[i] for i in rng.permutation(len(hidden))]
    shown = order[: 2 + int(rng.integers(2))]
    seen = []
    for color, shape in [*shown, *order[len(shown) : len(shown) + 2]]:
        for pair in (
            (color, SHAPES[int(rng.integers(len(SHAPES)))]),
            (tuple(COLORS)[int(rng.integers(len(COLORS)))], shape),
        ):
            if pair not in UNSEEN:
                seen.append(pair)
    return shown * max(1, round(len(seen) / len(shown))) + seen


def _draw_object(
    color: str,
    shape: str,
    small: float,
    config: SceneConfig,
    rng: np.random.Generator,
    *,
    held_out: bool,
) -> Object:
    """An object somewhere; :meth:`_Canvas.place` moves it."""
    is_digit = shape in DIGITS
    size = "small" if rng.random() < small else "large"
    low, high = (DIGIT_SIZES if is_digit else SIZES)[size]
    texture = PLAIN
    can = not is_digit and not (size == "small" and shape in THIN)
    if can and rng.random() < config.textured:
        texture = TEXTURES[int(rng.integers(len(TEXTURES)))]
    samples = samples_of(shape, held_out=held_out) if is_digit else (-1,)
    light = 0.9 + 0.2 * rng.random()
    channels = light * (np.array(COLORS[color]) + 16 * (rng.random(3) - 0.5))
    tilt = DIGIT_TILT if is_digit else MAX_TILT.get(shape, math.pi)
    return Object(
        shape=shape,
        color=color,
        texture=texture,
        size=size,
        rgb=tuple(int(c) for c in np.clip(channels, 0, 255)),
        sample=samples[int(rng.integers(len(samples)))],
        x=rng.random(),
        y=rng.random(),
        diameter=(low + (high - low) * rng.random()) * config.side / config.view,
        rotation=tilt * (2 * rng.random() - 1),
    )


class _Canvas:
    """Keeps count of what every pixel shows while objects are laid on it."""

    def __init__(self, config: SceneConfig):
        self._config = config
        self._owner = np.full((config.side, config.side), -1, np.int32)
        self._seen: list[int] = []  # pixels of each object
        self._least: list[float] = []

    def place(self, obj: Object, rng: np.random.Generator) -> Object | None:
        """Lays an object where it hides nobody, or nowhere."""
        config = self._config
        found = stamp(obj)  # moved by whole pixels, an object stays the same
        whole = found.distance < 0
        total = int(whole.sum())
        share = config.visible_digit if obj.is_digit else config.visible
        scale = (config.side / config.view) ** 2
        least = max(share * total, config.min_pixels * scale)
        for _ in range(PLACES):
            # Up to a third of its radius beyond the edge.
            room = config.side - 4 / 3 * (obj.diameter / 2)
            column, row = (int(obj.diameter / 3 + room * rng.random()) for _ in range(2))
            outer, inner = window(found.top + row, found.left + column, whole.shape, config.side)
            mask = whole[inner]
            if mask.sum() < least:
                continue
            hidden = self._owner[outer][mask]
            lost = np.bincount(hidden[hidden >= 0], minlength=len(self._seen))
            left = np.array(self._seen, int) - lost
            if (left < np.array(self._least))[lost > 0].any():
                continue
            self._owner[outer][mask] = len(self._seen)
            self._seen = [*left.tolist(), int(mask.sum())]
            self._least.append(least)
            return obj._replace(x=obj.x + column, y=obj.y + row)
        return None


def _some(items: Sequence[str], low: int, high: int, rng: np.random.Generator) -> tuple[str, ...]:
    """Between ``low`` and ``high`` different ones."""
    count = low + int(rng.integers(high - low + 1))
    return tuple(items[i] for i in rng.permutation(len(items))[:count])
