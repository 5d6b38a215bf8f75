"""J&F, the measure of the DAVIS challenges for objects that are given in the first frame.

J is the IoU of a mask with the annotated one; F the F-measure of their outlines, where an outline
pixel is right if the other outline comes within .008 of the image's diagonal (Perazzi et al., CVPR
2016; Pont-Tuset et al., arXiv 1704.00675). Both are means over the frames of an object, the first
and the last one excluded, and then over all objects of all sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from scipy.spatial import KDTree

VOID = 255  # a label for pixels that count neither way
TOLERANCE = 0.008  # of the diagonal
RECALL_AT = 0.5

Labels = UInt8[np.ndarray, "h w"]


class ObjectScore(NamedTuple):
    """J and F of one object in every scored frame."""

    sequence: str
    object_id: int
    j: Float[np.ndarray, " t"]
    f: Float[np.ndarray, " t"]


class Statistics(NamedTuple):
    """Of one object, or the means of several."""

    mean: float
    recall: float  # share of frames above .5
    decay: float  # mean of the first quarter of the frames minus that of the last


def score_objects(
    sequence: str, frames: Iterable[tuple[Labels, Labels]], objects: Sequence[int]
) -> list[ObjectScore]:
    """J and F of all objects of a sequence.

    Args:
      sequence: its name.
      frames: (predicted, annotated) labels of the frames that count, in order; one at a time is
        held in memory.
      objects: their labels.
    """
    j: dict[int, list[float]] = {label: [] for label in objects}
    f: dict[int, list[float]] = {label: [] for label in objects}
    for found, truth in frames:
        known = truth != VOID
        for label in objects:
            masks = (found == label) & known, truth == label
            j[label].append(region(*masks))
            f[label].append(contour(*masks))
    return [ObjectScore(sequence, o, np.asarray(j[o]), np.asarray(f[o])) for o in objects]


def region(found: Bool[np.ndarray, "h w"], truth: Bool[np.ndarray, "h w"]) -> float:
    """IoU; 1 where both are empty."""
    union = np.count_nonzero(found | truth)
    return np.count_nonzero(found & truth) / union if union else 1.0


def contour(
    found: Bool[np.ndarray, "h w"], truth: Bool[np.ndarray, "h w"], tolerance: float = TOLERANCE
) -> float:
    """F-measure of the outlines; 1 where neither mask has one, 0 where one mask has none.

    Args:
      found: the predicted mask.
      truth: the annotated mask.
      tolerance: as a fraction of the diagonal; rounded up to whole pixels.
    """
    radius = math.ceil(tolerance * math.hypot(*truth.shape))
    found_points, truth_points = (np.argwhere(outline(mask)) for mask in (found, truth))
    if not len(found_points) or not len(truth_points):
        return float(len(found_points) == len(truth_points))
    precision = _share_within(found_points, truth_points, radius)
    recall = _share_within(truth_points, found_points, radius)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def outline(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Pixels that differ from their neighbour to the right, below, or in both directions.

    In the last row and column only the neighbour that exists counts, and the last pixel never does.
    """
    next_ = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    edge = mask ^ next_[:-1, 1:] | mask ^ next_[1:, :-1]
    edge[:-1, :-1] |= mask[:-1, :-1] ^ mask[1:, 1:]
    return edge


def statistics(values: Float[np.ndarray, " t"]) -> Statistics:
    """Mean, recall and decay of the frames of one object."""
    steps = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(np.int64) - 1
    first, last = values[steps[0] : steps[1] + 1], values[steps[3] : steps[4] + 1]
    decay = float(first.mean() - last.mean())
    return Statistics(float(values.mean()), float((values > RECALL_AT).mean()), decay)


def summary(scores: Sequence[ObjectScore]) -> dict[str, float]:
    """DAVIS' figures as fractions: means over objects, whatever their sequence."""
    parts = {"J": [statistics(s.j) for s in scores], "F": [statistics(s.f) for s in scores]}
    means = {name: np.mean(values, axis=0).tolist() for name, values in parts.items()}
    result = {"J&F": (means["J"][0] + means["F"][0]) / 2}
    for name, (mean, recall, decay) in means.items():
        result |= {name: mean, f"{name}_recall": recall, f"{name}_decay": decay}
    return result


def _share_within(
    points: Int[np.ndarray, "n 2"], others: Int[np.ndarray, "m 2"], radius: int
) -> float:
    """Share of points with another one in a disc of ``radius`` pixels around them."""
    # The bound is exclusive, and squared distances are whole numbers: between r^2 and r^2 + 1.
    bound = math.sqrt(radius**2 + 0.5)
    distance, _ = KDTree(others).query(points, distance_upper_bound=bound)
    return float(np.isfinite(distance).mean())
