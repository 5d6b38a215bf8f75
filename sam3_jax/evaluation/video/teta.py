"""TETA, track every thing accuracy (arXiv 2207.12978; ``teta_eval_toolkit`` upstream).

Localisation, association and classification apart from each other, and their mean. All tracks of
a video are compared whatever their class: an object that is found and tracked under a wrong name
still counts for the first two. Only predictions near an annotated object (IoU .5) can be wrong
in localisation; in classification all can, because the annotations here are exhaustive.

The figures are the toolkit's, its peculiarities included (docs/evaluation.md lists them).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from sam3_jax.evaluation.video.matching import (
    Association,
    align,
    assign,
    association,
    reached,
    total,
)
from sam3_jax.evaluation.video.overlaps import Frame, Overlaps

ALPHAS = np.arange(0.0, 0.99, 0.05)
CLASS_FROM = 10  # classification is judged from the threshold ALPHAS[10] = .5 on
NEAR = 0.5

Found = list[set[int]]  # indices of predicted tracks, one set a frame


class TetaCounts(NamedTuple):
    """What one video, or several, add to the figures of a class."""

    loc_tp: Int[np.ndarray, " a"]
    loc_fn: Int[np.ndarray, " a"]
    loc_fp: Int[np.ndarray, " a"]
    association: Float[np.ndarray, " a"]  # sums over true positives of localisation
    association_recall: Float[np.ndarray, " a"]
    association_precision: Float[np.ndarray, " a"]
    cls_tp: Int[np.ndarray, " c"]
    cls_fn: Int[np.ndarray, " c"]
    cls_fp: Int[np.ndarray, " c"]


def count(
    video: Overlaps,
    truth_classes: Sequence[int],
    found_classes: Sequence[int],
    classes: Sequence[int],
) -> dict[int, TetaCounts]:
    """Counts of each class in one video.

    Args:
      video: all tracks, whatever their class.
      truth_classes: of the annotated tracks.
      found_classes: of the predicted tracks.
      classes: those with a target anywhere in the data set, in the order of the file. Other
        classes that were predicted are never counted as wrong names.
    """
    frames = [frame for frame in video.frames if len(frame.truth)]
    video = video._replace(frames=frames)
    truth_class, found_class = (np.asarray(c, np.int64) for c in (truth_classes, found_classes))
    taken = _assigned_to_all(video)
    wrong: dict[int, Int[np.ndarray, " c"]] = {c: np.zeros(_cls_size(), np.int64) for c in classes}
    counts = {}
    for name in classes:
        own, named = truth_class == name, found_class == name
        if own.any() or named.any():
            near = _near(frames, own, taken)
            counts[name] = _count_class(video, own, named, near, name, found_class, wrong)
    return {name: c._replace(cls_fp=c.cls_fp + wrong[name]) for name, c in counts.items()}


def _cls_size() -> int:
    return len(ALPHAS) - CLASS_FROM


def _assigned_to_all(video: Overlaps) -> list[dict[int, int]]:
    """Annotated track -> predicted one in each frame, at IoU .5, all classes competing."""
    everything = np.ones(len(video.truth_volume), bool)
    nobody: list[dict[int, int]] = [{} for _ in video.frames]
    candidates = sorted(set().union(*_near(video.frames, everything, nobody)))
    part = video.part(range(len(everything)), candidates)
    alignment, result = align(part), []
    for frame in part.frames:
        truth, found, iou = assign(frame, alignment)
        good = reached(iou, NEAR)
        names = (candidates[i] for i in found[good])
        result.append(dict(zip(truth[good].tolist(), names, strict=True)))
    return result


def _near(
    frames: Sequence[Frame], own: Bool[np.ndarray, " G"], taken: Sequence[Mapping[int, int]]
) -> Found:
    """Predictions close to an object of the class that are not those of another one's object."""
    result = []
    for frame, others in zip(frames, taken, strict=True):
        close = (frame.iou[own[frame.truth]] >= NEAR).any(0)
        elsewhere = {found for truth, found in others.items() if not own[truth]}
        result.append(set(frame.found[close].tolist()) - elsewhere)
    return result


def _count_class(
    video: Overlaps,
    own: Bool[np.ndarray, " G"],
    named: Bool[np.ndarray, " F"],
    near: Found,
    name: int,
    found_class: Int[np.ndarray, " F"],
    wrong: dict[int, Int[np.ndarray, " c"]],
) -> TetaCounts:
    """Counts of one class, but for wrong names, which are added to ``wrong`` of their class."""
    candidates = sorted(set().union(*near))
    stray = [
        sum(named[i] and i not in close for i in frame.found.tolist())
        for frame, close in zip(video.frames, near, strict=True)
    ]
    part = video.part(np.flatnonzero(own).tolist(), candidates)
    alignment, size = align(part), len(ALPHAS)
    matches = np.zeros((size, *part.common.shape), np.int64)
    loc_fp, cls_tp, cls_fn = (np.zeros(n, np.int64) for n in (size, _cls_size(), _cls_size()))
    if not candidates:
        # The toolkit forgets what was counted before: with no prediction near, the false positives
        # of classes that come earlier in the file are dropped.
        wrong[name] = np.full(_cls_size(), sum(stray))
        nothing = Association(*np.zeros((3, size)))
        loc_fn = np.full(size, alignment.truth_frames.sum())
        return TetaCounts(matches.sum((1, 2)), loc_fn, loc_fp, *nothing, cls_tp, cls_fn, 0 * cls_tp)
    for frame, close, more in zip(part.frames, near, stray, strict=True):
        wrong[name] += more
        if not len(frame.truth):
            continue
        truth, found, iou = assign(frame, alignment)
        labels = found_class[[candidates[i] for i in found]]
        for a, alpha in enumerate(ALPHAS):
            good = reached(iou, alpha)
            matches[a, truth[good], found[good]] += 1
            loc_fp[a] += len(close - {candidates[i] for i in found[good]})
            if a >= CLASS_FROM:
                others = labels[good & (labels != name)]
                cls_tp[a - CLASS_FROM] += good.sum() - len(others)
                cls_fn[a - CLASS_FROM] += len(others)
                for label in filter(wrong.__contains__, others.tolist()):
                    wrong[label][a - CLASS_FROM] += 1
    tp = matches.sum((1, 2))
    loc_fn = alignment.truth_frames.sum() - tp
    shares = association(matches, alignment)
    return TetaCounts(tp, loc_fn, loc_fp, *shares, cls_tp, cls_fn, 0 * cls_tp)


def figures(counts: Sequence[TetaCounts]) -> dict[str, float]:
    """The figures of one class, as fractions; means over the thresholds."""
    sums = total(counts)

    def part(tp: np.ndarray, *others: np.ndarray) -> float:
        return float(np.mean(tp / np.maximum(1, tp + sum(others))))

    def shared(value: np.ndarray) -> float:
        return float(np.mean(value / np.maximum(1, sums.loc_tp)))

    loc_a = part(sums.loc_tp, sums.loc_fn, sums.loc_fp)
    assoc_a = shared(sums.association)
    cls_a = part(sums.cls_tp, sums.cls_fn, sums.cls_fp)
    return {
        "TETA": (loc_a + assoc_a + cls_a) / 3,
        "LocA": loc_a,
        "AssocA": assoc_a,
        "ClsA": cls_a,
        "LocRe": part(sums.loc_tp, sums.loc_fn),
        "LocPr": part(sums.loc_tp, sums.loc_fp),
        "AssocRe": shared(sums.association_recall),
        "AssocPr": shared(sums.association_precision),
        "ClsRe": part(sums.cls_tp, sums.cls_fn),
        "ClsPr": part(sums.cls_tp, sums.cls_fp),
    }


def is_empty(counts: Sequence[TetaCounts]) -> bool:
    """Whether a class has nothing that localisation counts; the mean over classes skips it."""
    sums = total(counts)
    return not (sums.loc_tp + sums.loc_fn + sums.loc_fp).any()
