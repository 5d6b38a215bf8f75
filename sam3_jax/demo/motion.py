"""How the demo's objects move: over the picture, behind each other, out of it and back again.

A clip is a pure function of the split, a seed and an index, like a picture (``scene.py``): objects
are drawn as pictures' are and laid out at once, then each follows a path of its own, while the
camera pans over a larger background. Who lies on top stays on top, so paths that cross occlude.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from sam3_jax.demo.backgrounds import draw_background
from sam3_jax.demo.layout import SceneConfig, draw_objects
from sam3_jax.demo.objects import BASE_SIDE, Object
from sam3_jax.demo.phrases import Query, draw_queries
from sam3_jax.demo.render import render, visible_masks

SPLITS = ("train", "valid", "test")  # in the order of their streams: append only
STREAM = 5417  # apart from the pictures' streams
OBJECTS, PATHS, PIXELS, PHRASES = range(4)
FEWEST, MOST = 3, 6  # objects of a clip
PAN = 32  # pixels that the camera moves to each side, at most
AWAY = 0.35  # of the objects leave the picture and come back
STILL = 0.15  # of them only turn


class Path(NamedTuple):
    """Of one object, in pixels and radians a frame; ``swing``: to both sides of its line."""

    velocity: tuple[float, float]
    swing: tuple[float, float]
    period: float  # frames
    phase: float
    turn: float


class Movie(NamedTuple):
    """A clip before it is drawn: where every object is in every frame."""

    name: str
    frames: tuple[tuple[Object, ...], ...]
    pans: tuple[tuple[int, int], ...]  # (x, y) of the camera
    queries: tuple[Query, ...]


def make_movie(split: str, index: int, length: int, *, seed: int = 0) -> Movie:
    """The ``index``-th clip of a split.

    Args:
      split: of ``SPLITS``; other splits than train have other photographs and digits.
      length: frames.
      seed: another one gives other clips. The held-out sets have seed 0.
    """
    config = SceneConfig(max_objects=MOST)
    held_out = split != "train"
    rng = _chance(split, index, seed, OBJECTS)
    objects: tuple[Object, ...] = ()
    while len(objects) < FEWEST:
        objects = draw_objects(config, rng, held_out=held_out, unseen=False)
    rng = _chance(split, index, seed, PATHS)
    paths = [_draw_path(obj, rng) for obj in objects]
    pans = _draw_pans(length, rng)
    frames = tuple(
        tuple(_moved(obj, path, t, pan) for obj, path in zip(objects, paths, strict=True))
        for t, pan in enumerate(pans)
    )
    rng = _chance(split, index, seed, PHRASES)
    queries = tuple(draw_queries(objects, 3, 3, config.hard, rng))
    return Movie(f"{split}_{index:05d}", frames, pans, queries)


def masks_of(movie: Movie) -> list[Bool[np.ndarray, "n s s"]]:
    """The visible part of every object, frame by frame."""
    return [visible_masks(objects, BASE_SIDE) for objects in movie.frames]


def pictures_of(
    movie: Movie, split: str, index: int, *, seed: int = 0
) -> list[UInt8[np.ndarray, "s s 3"]]:
    """The frames, in RGB."""
    rng = _chance(split, index, seed, PIXELS)
    wide = draw_background(BASE_SIDE + 2 * PAN, rng, held_out=split != "train")
    pictures = []
    for objects, (x, y) in zip(movie.frames, movie.pans, strict=True):
        left, top = PAN + x, PAN + y
        background = wide[top : top + BASE_SIDE, left : left + BASE_SIDE]
        pictures.append(render(objects, background))
    return pictures


def _draw_path(obj: Object, rng: np.random.Generator) -> Path:
    speed, direction = 1.0 + 4.0 * rng.random(), 2 * math.pi * rng.random()
    kind, phase = rng.random(2)
    turn = 0.12 * (2 * rng.random() - 1)
    period = 18.0 + 24.0 * rng.random()
    if obj.is_digit:
        turn *= 0.25  # nobody can tell a six from a nine that stands on its head
    if kind < STILL:
        return Path((0.0, 0.0), (0.0, 0.0), period, 0.0, turn)
    if kind < STILL + AWAY:
        # Along the shortest way out, and as far again.
        x, y = obj.x - BASE_SIDE / 2, obj.y - BASE_SIDE / 2
        across = abs(x) > abs(y)
        far = BASE_SIDE / 2 - max(abs(x), abs(y)) + obj.diameter
        reach = math.copysign(0.6 * far, x if across else y)
        period = 30.0 + 15.0 * phase  # quicker, it would jump
        swing = (reach, 0.0) if across else (0.0, reach)
        return Path((0.0, 0.0), swing, period, 0.0, turn)
    velocity = (speed * math.cos(direction), speed * math.sin(direction))
    swing = tuple(float(20 * (2 * share - 1)) for share in rng.random(2))
    return Path(velocity, swing, period, float(2 * math.pi * phase), turn)


def _moved(obj: Object, path: Path, t: int, pan: tuple[int, int]) -> Object:
    """The object at frame ``t``. Who wanders is reflected a little beyond the edge."""
    angle = 2 * math.pi * t / path.period
    # From 0 to twice the reach and back where the phase is 0; around the line elsewhere.
    swing = math.cos(path.phase) - math.cos(path.phase + angle)
    x, y = (
        start + speed * t + reach * swing
        for start, speed, reach in zip((obj.x, obj.y), path.velocity, path.swing, strict=True)
    )
    if any(path.velocity):
        edge = obj.diameter / 3
        x, y = (_reflected(value, -edge, BASE_SIDE + edge) for value in (x, y))
    return obj._replace(x=x - pan[0], y=y - pan[1], rotation=obj.rotation + path.turn * t)


def _reflected(value: float, low: float, high: float) -> float:
    span = high - low
    place = (value - low) % (2 * span)
    return low + min(place, 2 * span - place)


def _draw_pans(length: int, rng: np.random.Generator) -> tuple[tuple[int, int], ...]:
    """A smooth way of the camera that begins at (0, 0); half of the time it stands still."""
    moves, x, y, phase = rng.random(4)
    period = 30.0 + 40.0 * rng.random()
    if moves < 0.5:
        return ((0, 0),) * length
    reach = (0.5 * PAN * (2 * x - 1), 0.5 * PAN * (2 * y - 1))
    phase *= 2 * math.pi
    waves = [math.sin(phase + 2 * math.pi * t / period) - math.sin(phase) for t in range(length)]
    return tuple((round(reach[0] * wave), round(reach[1] * wave)) for wave in waves)


def _chance(split: str, index: int, seed: int, stream: int) -> np.random.Generator:
    words = (STREAM, seed, SPLITS.index(split), index, stream)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


def is_seen_at_first(masks: Sequence[Bool[np.ndarray, "n s s"]], least: int) -> list[int]:
    """Objects with so many pixels in the first frame."""
    return np.flatnonzero(masks[0].sum((1, 2)) >= least).tolist()
