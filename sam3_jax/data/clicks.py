"""Simulated users: where somebody clicks who means a mask, and where they correct one.

Upstream: ``sam3/train/transforms/point_sampling.py``. Points are (x, y) at pixel centres; labels: 1
on the object, 0 off it.
"""

from __future__ import annotations

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Float


def first_click(
    mask: Bool[np.ndarray, "h w"], rng: np.random.Generator, *, center: bool = False
) -> Float[np.ndarray, " 2"]:
    """A point on the object: anywhere, or the one furthest from its edge.

    Raises:
      ValueError: on an empty mask.
    """
    if not mask.any():
        raise ValueError("an empty mask cannot be clicked on; leave such targets out")
    return _pick(mask, rng, center)


def correction_click(
    predicted: Bool[np.ndarray, "h w"],
    mask: Bool[np.ndarray, "h w"],
    rng: np.random.Generator,
    *,
    center: bool = False,
) -> tuple[Float[np.ndarray, " 2"], int]:
    """A point where the prediction is wrong, and its label.

    Anywhere in the error, or in the middle of its larger kind (missed or too much), as in
    upstream's evaluation. Where nothing is wrong, a point of the mask (or outside an empty one).
    """
    missed, extra = mask & ~predicted, predicted & ~mask
    wrong = missed | extra
    if not wrong.any():
        wrong = mask if mask.any() else ~mask
    elif center:
        depth = [_depth(region).max() for region in (missed, extra)]
        wrong = missed if depth[0] >= depth[1] else extra
    point = _pick(wrong, rng, center)
    return point, int(mask[int(point[1]), int(point[0])])


def _pick(
    region: Bool[np.ndarray, "h w"], rng: np.random.Generator, center: bool
) -> Float[np.ndarray, " 2"]:
    index = _depth(region).argmax() if center else rng.choice(np.flatnonzero(region))
    row, column = divmod(int(index), region.shape[1])
    return np.array([column + 0.5, row + 0.5])


def _depth(region: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """Distance of every pixel to the edge of its region; the picture's border is an edge."""
    return scipy.ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
