"""Overlap of all predicted tracks of a video with all annotated ones, frame by frame.

The masks stay run lengths; of every frame only a small matrix of quotients is kept, of the tracks
that are visible in it. Per-frame measures (HOTA, TETA) and the one of volumes (cgF1) share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from pycocotools import mask as coco_mask

from sam3_jax.evaluation.video.records import Track


class Frame(NamedTuple):
    """The tracks that are visible in one frame, by their index, and their overlap."""

    truth: Int[np.ndarray, " g"]
    found: Int[np.ndarray, " f"]
    iou: Float[np.ndarray, "g f"]


class Overlaps(NamedTuple):
    """G annotated and F predicted tracks of a video."""

    frames: list[Frame]
    common: Int[np.ndarray, "G F"]  # pixels of all frames in both
    truth_volume: Int[np.ndarray, " G"]  # pixels of all frames
    found_volume: Int[np.ndarray, " F"]

    def volume_iou(self) -> Float[np.ndarray, "F G"]:
        """IoU of mask volumes: pixels in both over pixels in either, of all frames together."""
        union = self.truth_volume[:, None] + self.found_volume - self.common
        return np.divide(self.common, union, out=np.zeros(union.shape), where=union > 0).T

    def part(self, truth: Sequence[int], found: Sequence[int]) -> Overlaps:
        """Some of the tracks, numbered anew in the order given; all frames stay."""
        truth, found = np.asarray(truth, np.int64), np.asarray(found, np.int64)
        new_truth = _places(truth, len(self.truth_volume))
        new_found = _places(found, len(self.found_volume))
        frames = []
        for frame in self.frames:
            rows, columns = new_truth[frame.truth], new_found[frame.found]
            iou = frame.iou[np.ix_(rows >= 0, columns >= 0)]
            frames.append(Frame(rows[rows >= 0], columns[columns >= 0], iou))
        common = self.common[np.ix_(truth, found)]
        return Overlaps(frames, common, self.truth_volume[truth], self.found_volume[found])


def overlaps(truth: Sequence[Track], found: Sequence[Track]) -> Overlaps:
    """Compares all tracks of a video; all have one mask a frame."""
    length = max((len(track.masks) for track in (*truth, *found)), default=0)
    volumes = [np.zeros(len(part), np.int64) for part in (truth, found)]
    common = np.zeros((len(truth), len(found)), np.int64)
    frames = []
    for t in range(length):
        index, masks, areas = [], [], []
        for part, volume in zip((truth, found), volumes, strict=True):
            visible = np.asarray([i for i, track in enumerate(part) if track.masks[t]], np.int64)
            index.append(visible)
            masks.append([part[i].masks[t] for i in visible])
            areas.append(np.asarray(coco_mask.area(masks[-1]), np.int64).reshape(len(visible)))
            volume[visible] += areas[-1]
        iou = np.zeros((len(index[0]), len(index[1])))
        if iou.size:
            iou = np.asarray(coco_mask.iou(*masks, [0] * iou.shape[1]))
        frames.append(Frame(*index, iou))
        # An IoU of two whole numbers of pixels gives the common ones back, exactly.
        both = iou / (1 + iou) * (areas[0][:, None] + areas[1])
        common[np.ix_(*index)] += np.rint(both).astype(np.int64)
    return Overlaps(frames, common, *volumes)


def _places(chosen: Int[np.ndarray, " k"], total: int) -> Int[np.ndarray, " total"]:
    """Old index -> new one, -1 for what is left out."""
    places = np.full(total, -1)
    places[chosen] = np.arange(len(chosen))
    return places
