"""Suppression against loops written out, overlaps against pycocotools."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sam3_jax.inference.nms import box_nms, boxes_of_masks, mask_overlaps, nms, overlap_ratio


def rectangles(rng: np.random.Generator, n: int, size: tuple[int, int]) -> np.ndarray:
    """Masks of rectangles, many of them overlapping; the last one is empty."""
    masks = np.zeros((n, *size), bool)
    for mask in masks[:-1]:
        y, x = rng.integers(0, size[0] // 2), rng.integers(0, size[1] // 2)
        height, width = rng.integers(2, size[0] // 2), rng.integers(2, size[1] // 2)
        mask[y : y + height, x : x + width] = True
    return masks


def greedy(overlap: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    """The definition: go from the best to the worst, keep what no kept one overlaps."""
    kept: list[int] = []
    for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        if all(overlap[i, j] <= threshold for j in kept):
            kept.append(i)
    return kept


def test_overlaps_are_counted_exactly(rng):
    masks = rectangles(rng, 9, (50, 140))  # more than two words of 64 pixels a row, not a multiple
    common, area = mask_overlaps(masks)
    for i, a in enumerate(masks):
        assert area[i] == a.sum()
        for j, b in enumerate(masks):
            assert common[i, j] == (a & b).sum()


def test_ratios_are_those_of_pycocotools(rng):
    masks = rectangles(rng, 12, (40, 50))[:-1]
    common, area = mask_overlaps(masks)
    rles = coco_mask.encode(np.asfortranarray(np.moveaxis(masks, 0, -1), np.uint8))
    iou = coco_mask.iou(rles, rles, [0] * len(rles))
    # Against "crowds" pycocotools divides by the area of the first mask alone.
    of_first = coco_mask.iou(rles, rles, [1] * len(rles))
    expected = {"iou": iou, "iom": np.maximum(of_first, of_first.T)}
    for measure, ratio in expected.items():
        actual = overlap_ratio(common, area[:, None], area[None], measure)
        np.testing.assert_allclose(actual, ratio, rtol=1e-12)  # one division in float64


@pytest.mark.parametrize("measure", ["iou", "iom"])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_masks_kept_are_those_of_the_definition(rng, measure, threshold):
    masks = rectangles(rng, 40, (32, 32))
    scores = rng.integers(0, 8, 40) / 8  # many ties
    common, area = mask_overlaps(masks)
    overlap = np.zeros((40, 40))
    for i in range(39):
        for j in range(39):
            union = area[i] + area[j] - common[i, j]
            overlap[i, j] = common[i, j] / (union if measure == "iou" else min(area[i], area[j]))
    kept = nms(masks, scores, measure=measure, threshold=threshold)
    assert kept.tolist() == greedy(overlap, scores, threshold)
    assert 39 in kept, "the empty mask stays"
    if threshold < 1:
        assert 1 < len(kept) < 40


def test_threshold_is_strict_and_a_dropped_mask_drops_none():
    row = np.zeros((3, 1, 8), bool)
    row[0, 0, 0:4], row[1, 0, 2:6], row[2, 0, 4:8] = True, True, True  # IoU of neighbours: 2 / 6
    scores = np.asarray([0.9, 0.8, 0.7])
    assert nms(row, scores, measure="iou", threshold=1 / 3).tolist() == [0, 1, 2]
    assert nms(row, scores, measure="iou", threshold=0.33).tolist() == [0, 2]
    assert nms(row, scores[::-1].copy(), measure="iou", threshold=0.33).tolist() == [2, 0]


def test_iom_drops_the_part_of_a_larger_mask():
    masks = np.zeros((2, 10, 10), bool)
    masks[0], masks[1, 2:4, 2:4] = True, True
    scores = np.asarray([0.9, 0.8])
    assert nms(masks, scores, measure="iom", threshold=0.9).tolist() == [0]
    assert nms(masks, scores, measure="iou", threshold=0.9).tolist() == [0, 1]


def test_nothing_gives_nothing_and_an_unknown_measure_is_named():
    none = np.zeros((0, 8, 8), bool)
    assert nms(none, np.zeros(0), measure="iou", threshold=0.5).shape == (0,)
    assert boxes_of_masks(none).shape == (0, 4)
    assert box_nms(np.zeros((0, 4)), np.zeros(0), 0.5).shape == (0,)
    with pytest.raises(ValueError, match="one of iou, iom, got 'dice'"):
        nms(none, np.zeros(0), measure="dice", threshold=0.5)


def test_200_masks_need_little_memory():
    masks = np.ones((200, 288, 288), bool)
    tracemalloc.start()
    common, _ = mask_overlaps(masks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (common == 288 * 288).all()
    assert peak < 12e6  # a bit a pixel, three times, is 7 MB; as float32 all would be 66


def naive_box_iou(a: np.ndarray, b: np.ndarray) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union > 0 else 0.0


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.7])
def test_boxes_kept_are_those_of_the_definition(rng, threshold):
    low = rng.integers(0, 30, (150, 2))
    boxes = np.concatenate([low, low + rng.integers(0, 30, (150, 2))], axis=1).astype(np.float32)
    scores = rng.integers(0, 20, 150).astype(np.float32)
    overlap = np.asarray([[naive_box_iou(a, b) for b in boxes.tolist()] for a in boxes.tolist()])
    kept = box_nms(boxes, scores, threshold)
    assert kept.tolist() == greedy(overlap, scores, threshold)
    assert 1 < len(kept) < 150
    flat = np.flatnonzero((boxes[:, 2:] == boxes[:, :2]).any(1))
    assert len(flat)
    assert set(flat) <= set(kept), "boxes without area overlap nothing"


def test_threshold_of_boxes_is_strict():
    boxes = np.asarray([[0, 0, 4, 1], [0, 0, 2, 1]], np.float32)
    assert box_nms(boxes, np.asarray([0.9, 0.8]), 0.5).tolist() == [0, 1]
    assert box_nms(boxes, np.asarray([0.8, 0.9]), 0.49).tolist() == [1]


def test_boxes_of_masks_are_tight_edges(rng):
    masks = np.zeros((4, 20, 30), bool)
    masks[0, 3, 4] = True
    masks[1] = True
    masks[3, 19, 0] = masks[3, 5, 29] = True
    expected = [[4, 3, 5, 4], [0, 0, 30, 20], [0, 0, 0, 0], [0, 5, 30, 20]]
    np.testing.assert_array_equal(boxes_of_masks(masks), expected)
    masks = rng.random((20, 20, 30)) < 0.01
    rles = coco_mask.encode(np.asfortranarray(np.moveaxis(masks, 0, -1), np.uint8))
    x, y, width, height = coco_mask.toBbox(rles).T
    expected = np.stack([x, y, x + width, y + height], axis=1)
    np.testing.assert_array_equal(boxes_of_masks(masks), expected)
