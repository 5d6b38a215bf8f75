"""Outlines of masks as polygons, for the formats that have nothing else.

Outlines run along the edges between pixels, so the corners are integers from 0 to the width or
height, and a polygon that is filled by the even-odd rule at the centres of pixels gives back the
mask exactly, before it is simplified. Pixels that touch at a corner only are separate parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.ndimage
import scipy.spatial
from jaxtyping import Bool, Float, Int

TOLERANCE = 1.42  # pixels: the staircase of a straight edge is up to 2**0.5 wide
AREA_CHANGE = 0.05  # simplifying may change the area of an outline by this share at most

Ring = Float[np.ndarray, "_ 2"]  # closed: the last corner (x, y) is joined to the first


class Part(NamedTuple):
    """A connected piece of a mask."""

    outer: Ring  # clockwise as seen on the screen
    holes: tuple[Ring, ...]  # counter-clockwise


def mask_parts(
    mask: Bool[np.ndarray, "h w"],
    tolerance: float = TOLERANCE,
    *,
    corner: tuple[int, int] = (0, 0),
) -> list[Part]:
    """The outlines of a mask, the piece with the largest outer outline first.

    Args:
      mask: may be empty; the list then is.
      tolerance: how far, in pixels, a simplified outline may be from the exact one. Pixels change
        only where they touch the outline as long as it is below 1.5. 0 keeps every corner.
      corner: (x, y) of the mask's first pixel in the picture.
    """
    if not mask.any():
        return []
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    offset = np.asarray([corner[0] + cols[0], corner[1] + rows[0]])
    mask = mask[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    rings = _trace(mask)
    # Which piece a hole is in: the one of the pixel above its first corner.
    pieces = None
    if len(rings) > 1:
        pieces, _ = scipy.ndimage.label(mask)
    outers: dict[int, Ring] = {}
    holes: dict[int, list[Ring]] = {}
    for ring in rings:
        x, y = ring[0]
        is_hole = not mask[y, x]
        piece = 0 if pieces is None else int(pieces[y - is_hole, x])
        simple = simplify((ring + offset).astype(np.float64), tolerance)
        if is_hole:
            holes.setdefault(piece, []).append(simple[::-1])
        else:
            outers[piece] = simple
    parts = [Part(outer, tuple(holes.get(piece, ()))) for piece, outer in outers.items()]
    return sorted(parts, key=lambda part: -abs(signed_area(part.outer)))


def _trace(mask: Bool[np.ndarray, "h w"]) -> list[Int[np.ndarray, "_ 2"]]:
    """All outlines, clockwise from the leftmost of their topmost corners.

    Along every grid line, corners pair up as the two ends of an edge. A corner is the end of one
    horizontal and one vertical edge; where two pixels touch diagonally there are two corners.
    """
    padded = np.pad(mask, 1).view(np.uint8)
    a, b, c, d = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    count = a + b + c + d
    diagonal = (count == 2) & (a == d)
    y, x = np.nonzero((count & 1).astype(bool) | diagonal)  # by rows, as the edges along x need
    double = diagonal[y, x]
    falling = np.repeat(a[y, x] & d[y, x], 1 + double)  # \ rather than /
    along_x = np.zeros(len(falling), np.intp)  # of two corners at a place: left one 0, right one 1
    along_x[np.cumsum(1 + double)[double] - 1] = 1
    y, x, double = (np.repeat(v, 1 + double) for v in (y, x, double))
    # Upper one 0, lower one 1. Pixels at a corner stay apart: \ pairs left with up, / with down.
    along_y = np.where(double & (falling == 0), 1 - along_x, along_x)
    by_columns = np.lexsort((along_y, y, x))
    partner = np.empty(len(y), np.intp)
    partner[by_columns[::2]], partner[by_columns[1::2]] = by_columns[1::2], by_columns[::2]

    down, seen, rings = partner.tolist(), bytearray(len(y)), []
    for start in range(0, len(down), 2):  # the topmost left end of an outline comes first
        if seen[start]:
            continue
        ring, node = [], start
        while not seen[node]:
            other = node ^ 1  # the other end of the horizontal edge
            seen[node] = seen[other] = 1
            ring += (node, other)
            node = down[other]
        rings.append(np.stack([x[ring], y[ring]], axis=1))
    return rings


def signed_area(ring: Ring) -> float:
    """Area inside a ring in square pixels, positive when clockwise on the screen (y down)."""
    x, y = ring[:, 0], ring[:, 1]
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def simplify(ring: Ring, tolerance: float) -> Ring:
    """Leaves out corners within ``tolerance`` of the line between their neighbours that stay.

    Douglas and Peucker's algorithm; with less tolerance where it would change the area much, as it
    would for small and thin shapes.
    """
    area = abs(signed_area(ring))
    while tolerance > 0.1:
        simple = ring[_kept(ring, tolerance)]
        if len(simple) >= 3 and abs(abs(signed_area(simple)) - area) <= AREA_CHANGE * area:
            return simple
        tolerance /= 2
    return ring


def _kept(ring: Ring, tolerance: float) -> Bool[np.ndarray, " _"]:
    """Which corners stay; the first one and the one farthest from it always do."""
    closed = np.concatenate([ring, ring[:1]])
    keep = np.zeros(len(closed), bool)
    far = int(np.argmax(((ring - ring[0]) ** 2).sum(1)))
    keep[[0, far]] = True
    waiting = [(0, far), (far, len(ring))]
    while waiting:
        first, last = waiting.pop()
        if last - first < 2:
            continue
        start, line = closed[first], closed[last] - closed[first]
        offset = closed[first + 1 : last] - start
        share = np.clip(offset @ line / max(line @ line, 1e-12), 0, 1)
        distance = ((offset - share[:, None] * line) ** 2).sum(1)
        worst = int(np.argmax(distance))
        if distance[worst] > tolerance**2:
            middle = first + 1 + worst
            keep[middle] = True
            waiting += [(first, middle), (middle, last)]
    return keep[:-1]


def join(rings: Sequence[Ring]) -> Ring:
    """Several rings as one: a bridge there and back joins each to the nearest corner before it.

    A bridge has no area: filled (even-odd or non-zero), holes stay holes and parts stay parts.
    """
    joined = rings[0]
    for ring in rings[1:]:
        distances, nearest = scipy.spatial.KDTree(joined).query(ring)
        there = int(np.argmin(distances))
        here = int(nearest[there])
        loop = np.concatenate([ring[there:], ring[: there + 1]])
        joined = np.concatenate([joined[: here + 1], loop, joined[here:]])
    return joined
