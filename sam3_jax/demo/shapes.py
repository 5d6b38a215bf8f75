"""Outlines as signed distances: where an object is, exactly.

Coordinates are those of an object: u to the right, v down, its surrounding circle has radius 1.
Distances are negative inside. They are those to the outline's nearest part, corners aside, where
they fall short: whether a point is inside is exact, and edges are drawn with the rest.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from sam3_jax.demo.digits import digit_distance
from sam3_jax.demo.objects import Object

Plane = Float[np.ndarray, "h w"]

RING = 0.58  # inner radius
STAR = 0.46  # radius of the inner corners
CROSS = 0.34  # half of an arm's width
HEART = 0.62  # half of the diagonal of its square
CRESCENT = (0.46, 0.80)  # shift to the right, and radius, of the disc that is cut out


def distance(obj: Object, u: Plane, v: Plane) -> Plane:
    """Signed distance to an object's outline, in its radii."""
    if obj.is_digit:
        return digit_distance(obj.sample, u, v)
    if obj.shape == "circle":
        return np.hypot(u, v) - 1
    if obj.shape == "ring":
        middle = (1 + RING) / 2
        return np.abs(np.hypot(u, v) - middle) - (1 - middle)
    if obj.shape == "heart":
        return _heart(u, v)
    if obj.shape == "crescent":
        shift, radius = CRESCENT
        return np.maximum(np.hypot(u, v) - 1, radius - np.hypot(u - shift, v))
    if obj.shape == "cross":
        return _cross(u, v)
    if obj.shape == "star":
        return _points(5, STAR, u, v)
    if obj.shape == "triangle":
        return _points(3, 0.5, u, v)
    return np.maximum(np.abs(u), np.abs(v)) - np.sqrt(0.5)  # a square


def _heart(u: Plane, v: Plane) -> Plane:
    """A square on its corner, with half discs on its two upper sides."""
    u, v = np.abs(u), v + 0.04  # fills the circle about evenly
    square = (u + np.abs(v) - HEART) / np.sqrt(2)
    disc = np.hypot(u - HEART / 2, v + HEART / 2) - HEART / np.sqrt(2)
    return np.minimum(square, disc)


def _cross(u: Plane, v: Plane) -> Plane:
    """Two bars."""
    tip = np.sqrt(1 - CROSS**2)
    u, v = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(u - tip, v - CROSS), np.maximum(u - CROSS, v - tip))


def _points(count: int, inner: float, u: Plane, v: Plane) -> Plane:
    """``count`` tips, the first at the top, and corners between them at radius ``inner``.

    A triangle has the middles of its sides there.
    """
    wedge = np.pi / count  # from a tip to the next corner: all of them look alike
    radius, angle = np.hypot(u, v), np.arctan2(u, -v)
    angle = np.abs(np.mod(angle + wedge, 2 * wedge) - wedge)
    along, across = inner * np.cos(wedge) - 1, inner * np.sin(wedge)  # the side, from the tip
    x, y = radius * np.cos(angle) - 1, radius * np.sin(angle)
    return (across * x - along * y) / np.hypot(along, across)
