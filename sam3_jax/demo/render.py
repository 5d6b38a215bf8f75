"""Draws objects over a background, and says exactly which pixels show each of them.

A pixel belongs to the topmost object whose outline its centre lies in. Masks need no colours, so
that annotations can be made, and checked, without a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from sam3_jax.demo.objects import PLAIN, Object
from sam3_jax.demo.shapes import distance

MARGIN = 7  # pixels around an object that its shadow needs
SHADOW = (3, 2)  # pixels down and to the right
SHADOW_ALPHA = 0.45
SHADOW_BLUR = 4.0
RIM_SHADE = 0.2  # of the colour
TEXTURE_SHADE = 0.34


class Stamp(NamedTuple):
    """An object on the pixels around it, which may lie outside of the picture."""

    top: int
    left: int
    distance: Float[np.ndarray, "h w"]  # of pixel centres to the outline, in pixels; inside < 0
    u: Float[np.ndarray, "h w"]  # coordinates of the object, in pixels
    v: Float[np.ndarray, "h w"]


def stamp(obj: Object, margin: int = 0) -> Stamp:
    """The object's square with ``margin`` pixels around it."""
    radius = obj.diameter / 2
    # A digit fills a square, which reaches beyond the circle when it is turned.
    reach = radius * (1.5 if obj.is_digit else 1) + margin + 1
    top, left = int(np.floor(obj.y - reach)), int(np.floor(obj.x - reach))
    size = int(np.ceil(2 * reach)) + 1
    x = left + np.arange(size) + 0.5 - obj.x
    y = (top + np.arange(size) + 0.5 - obj.y)[:, None]
    cos, sin = np.cos(obj.rotation), np.sin(obj.rotation)
    u, v = x * cos + y * sin, y * cos - x * sin
    return Stamp(top, left, distance(obj, u / radius, v / radius) * radius, u, v)


def window(top: int, left: int, shape: tuple[int, int], side: int) -> tuple[tuple, tuple]:
    """The part of a stamp that lies in the picture: indices into the picture, into the stamp."""
    rows = slice(max(top, 0), max(min(top + shape[0], side), 0))
    columns = slice(max(left, 0), max(min(left + shape[1], side), 0))
    inner = (
        slice(rows.start - top, max(rows.stop - top, rows.start - top)),
        slice(columns.start - left, max(columns.stop - left, columns.start - left)),
    )
    return (rows, columns), inner


def owners(objects: Sequence[Object], side: int) -> Int[np.ndarray, "s s"]:
    """Which object every pixel shows; -1: the background."""
    owner = np.full((side, side), -1, np.int32)
    for number, obj in enumerate(objects):
        found = stamp(obj)
        outer, inner = window(found.top, found.left, found.distance.shape, side)
        owner[outer][found.distance[inner] < 0] = number
    return owner


def visible_masks(objects: Sequence[Object], side: int) -> Bool[np.ndarray, "n s s"]:
    """The visible part of each object."""
    return owners(objects, side) == np.arange(len(objects))[:, None, None]


def render(
    objects: Sequence[Object], background: UInt8[np.ndarray, "s s 3"]
) -> UInt8[np.ndarray, "s s 3"]:
    """Paints the objects, the first at the bottom, with anti-aliased edges, rims and shadows."""
    canvas = background.astype(np.float32)
    for obj in objects:
        _paint(canvas, obj)
    return np.rint(canvas).astype(np.uint8)


def _paint(canvas: Float[np.ndarray, "s s 3"], obj: Object) -> None:
    found, side = stamp(obj, MARGIN), len(canvas)
    shape = found.distance.shape
    outer, inner = window(found.top + SHADOW[0], found.left + SHADOW[1], shape, side)
    shade = np.clip(0.5 - found.distance[inner] / SHADOW_BLUR, 0, 1) * SHADOW_ALPHA
    canvas[outer] *= (1 - shade[..., None]).astype(np.float32)
    outer, inner = window(found.top, found.left, shape, side)
    cut = Stamp(found.top, found.left, found.distance[inner], found.u[inner], found.v[inner])
    cover = np.clip(0.5 - cut.distance, 0, 1).astype(np.float32)[..., None]
    canvas[outer] += cover * (_fill(obj, cut) - canvas[outer])


def _fill(obj: Object, cut: Stamp) -> Float[np.ndarray, "h w 3"]:
    """Colours of an object: its texture, lit from above, within a dark rim."""
    rim = 0.9 if obj.is_digit else min(max(1.1, 0.035 * obj.diameter), 2.2)
    inside = np.clip(0.5 - cut.distance - rim, 0, 1)
    light = 1.0 - (1 - TEXTURE_SHADE) * _texture(obj, cut.u, cut.v)
    light = RIM_SHADE + (light - RIM_SHADE) * inside
    return (light[..., None] * np.array(obj.rgb)).astype(np.float32)


def _texture(
    obj: Object, u: Float[np.ndarray, "h w"], v: Float[np.ndarray, "h w"]
) -> Float[np.ndarray, "h w"]:
    """How dark the texture is: 0 for the colour itself, 1 for its shade."""
    if obj.texture == PLAIN:
        return np.zeros(u.shape)
    if obj.texture == "striped":
        period = np.clip(0.24 * obj.diameter, 7, 13)
        return np.clip(0.5 + _wave(v, period), 0, 1)
    if obj.texture == "checkered":
        period = np.clip(0.36 * obj.diameter, 10, 20)
        a, b = _wave(u + period / 4, period), _wave(v + period / 4, period)
        return np.clip(0.5 + np.sign(a * b) * np.minimum(np.abs(a), np.abs(b)), 0, 1)
    period = np.clip(0.27 * obj.diameter, 8, 14)
    du, dv = (np.mod(c, period) - period / 2 for c in (u, v))
    return np.clip(0.5 + 0.31 * period - np.hypot(du, dv), 0, 1)


def _wave(x: Float[np.ndarray, "h w"], period: float) -> Float[np.ndarray, "h w"]:
    """Pixels to the next edge of stripes, positive in every second one."""
    return (0.25 - np.abs(np.mod(x / period, 1) - 0.5)) * period
