"""Handwritten digits as shapes, from the set that scikit-learn ships.

That is the test part of the UCI "Optical Recognition of Handwritten Digits" data (E. Alpaydin,
C. Kaynak; CC BY 4.0): 1797 digits of 8 x 8 cells by 13 people. They lie person by person: a run
through 0 to 9, three times, begins again every 130 or so. The last three people are kept for the
held-out sets.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import ndimage

from sam3_jax.demo.objects import DIGITS

FIRST_HELD_OUT = 1415  # where a person begins
GRID = 64  # cells of a distance table over a digit's square
INK = 6.0  # of 16: above is stroke
NEIGHBORS = 5


class DigitSet(NamedTuple):
    """The digits of all people."""

    images: Float[np.ndarray, "n 8 8"]  # 0 to 16
    labels: Int[np.ndarray, " n"]
    legible: Bool[np.ndarray, " n"]  # all of the digits most like it are the same digit


@functools.cache
def digit_set() -> DigitSet:
    """Loads the digits, and finds those that nobody could read.

    A digit is legible when all of its nearest neighbours have its label: 94% are. The distances
    are whole numbers, so that the answer is the same everywhere.
    """
    from sklearn.datasets import load_digits  # an extra, and slow to import

    images, labels = load_digits(return_X_y=True)
    cells = np.rint(images).astype(np.int64)
    norms = np.einsum("ni,ni->n", cells, cells)
    distances = norms[:, None] + norms - 2 * np.einsum("ni,mi->nm", cells, cells)
    np.fill_diagonal(distances, np.iinfo(np.int64).max)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :NEIGHBORS]
    agree = (labels[nearest] == labels[:, None]).sum(1)
    return DigitSet(images.reshape(-1, 8, 8), labels, agree == NEIGHBORS)


@functools.cache
def samples_of(digit: str, *, held_out: bool) -> tuple[int, ...]:
    """Indices of the legible samples of a digit, of training's writers or of the others."""
    digits = digit_set()
    number = np.arange(len(digits.labels))
    chosen = digits.legible & (digits.labels == DIGITS.index(digit))
    return tuple(np.flatnonzero(chosen & ((number >= FIRST_HELD_OUT) == held_out)).tolist())


@functools.cache
def distance_table(sample: int) -> Float[np.ndarray, "g g"]:
    """Signed distance to the edge of a sample's strokes over the square [-1, 1] x [-1, 1].

    Negative inside; one unit is half of the digit's height, which fills the square.
    """
    image = np.pad(digit_set().images[sample], 2)
    # Cubic splines between the cells' centres give smooth strokes.
    fine = 8
    axis = (np.arange(len(image) * fine) + 0.5) / fine - 0.5
    rows, columns = np.meshgrid(axis, axis, indexing="ij")
    ink = ndimage.map_coordinates(image, [rows, columns], order=3, mode="nearest") > INK
    found = np.argwhere(ink)
    (top, left), (bottom, right) = found.min(0), found.max(0) + 1
    signed = ndimage.distance_transform_edt(~ink) - ndimage.distance_transform_edt(ink)
    signed = signed - np.where(signed > 0, 0.5, -0.5)  # to the edge, not to the next cell's centre
    half = (bottom - top) / 2
    centre = ((top + bottom) / 2 - 0.5, (left + right) / 2 - 0.5)
    steps = ((np.arange(GRID) + 0.5) / GRID * 2 - 1) * half
    rows, columns = np.meshgrid(centre[0] + steps, centre[1] + steps, indexing="ij")
    return ndimage.map_coordinates(signed, [rows, columns], order=1, mode="nearest") / half


def digit_distance(
    sample: int, u: Float[np.ndarray, "h w"], v: Float[np.ndarray, "h w"]
) -> Float[np.ndarray, "h w"]:
    """Signed distance at points (u right, v down) of the digit's square."""
    table = distance_table(sample)
    x, y = (np.clip((c + 1) / 2 * GRID - 0.5, 0, GRID - 1.001) for c in (u, v))
    column, row = x.astype(np.int64), y.astype(np.int64)
    fx, fy = x - column, y - row
    top = table[row, column] * (1 - fx) + table[row, column + 1] * fx
    bottom = table[row + 1, column] * (1 - fx) + table[row + 1, column + 1] * fx
    outside = np.maximum(np.maximum(np.abs(u), np.abs(v)) - 1, 0)
    return top * (1 - fy) + bottom * fy + outside
