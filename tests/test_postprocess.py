"""Outputs to pixels: scores, boxes, upscaling, holes, run lengths."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
import skimage.measure
import torch
from pycocotools import mask as coco_mask

from sam3_jax.inference import postprocess
from sam3_jax.inference.placed import Placed, annotation, place
from sam3_jax.inference.postprocess import Detections, detections, upscale_crop, upscale_masks
from sam3_jax.inference.rle import decode_mask, encode_mask


def smooth_logits(rng: np.random.Generator, n: int, side: int) -> np.ndarray:
    """Logits with blobs, not noise: sums of a few waves."""
    y, x = np.mgrid[:side, :side] / side
    waves = rng.normal(size=(n, 6, 3)).astype(np.float32) * (1.0, 12.0, 12.0)
    return np.stack([sum(a * np.sin(u * x + v * y + a) for a, u, v in w) for w in waves]).astype(
        np.float32
    )


def test_scores_multiply_with_presence(rng):
    logits, presence = rng.normal(size=(3, 7)) * 5, rng.normal(size=3) * 5
    expected = torch.tensor(logits).sigmoid() * torch.tensor(presence).sigmoid()[:, None]
    actual = postprocess.instance_scores(logits.astype(np.float32), presence.astype(np.float32))
    # float32 logits: a relative rounding of 6e-8 times |logit| < 20
    np.testing.assert_allclose(actual, expected, rtol=5e-6)


def test_extreme_logits_do_not_overflow():
    with np.errstate(all="raise"):
        values = postprocess.sigmoid(np.asarray([-1e4, 0, 1e4], np.float32))
    np.testing.assert_array_equal(values, np.asarray([0, 0.5, 1], np.float32))


def test_select_is_strict_sorted_and_stable():
    scores = np.asarray([0.5, 0.7, 0.2, 0.9, 0.7], np.float32)
    np.testing.assert_array_equal(postprocess.select(scores, 0.5), [3, 1, 4])
    assert len(postprocess.select(scores, 0.9)) == 0


def test_boxes_become_corners_in_pixels():
    fractions = np.asarray([[0.5, 0.25, 0.5, 0.25], [0.0, 0.0, 0.2, 0.2]], np.float32)
    boxes = postprocess.boxes_to_pixels(fractions, (200, 400))
    # not clipped, as upstream
    np.testing.assert_allclose(boxes, [[100, 25, 300, 75], [-40, -20, 40, 20]], rtol=1e-6)


@pytest.mark.parametrize("size", [(96, 140), (13, 200), (7, 5), (32, 32), (1, 1), (300, 31)])
def test_upscaling_equals_torch(rng, size):
    logits = smooth_logits(rng, 5, 32)
    expected = torch.nn.functional.interpolate(
        torch.tensor(logits)[:, None], size, mode="bilinear", align_corners=False
    )[:, 0].numpy()
    masks = postprocess.upscale_masks(logits, size)
    assert masks.shape == (5, *size)
    # Interpolated logits that are 0 up to float32 rounding may fall on either side.
    clear = np.abs(expected) > 1e-5
    np.testing.assert_array_equal(masks[clear], (expected > 0)[clear])
    assert clear.mean() > 0.99


def test_only_the_rectangle_of_positive_logits_is_touched_and_all_of_it(rng):
    """The shortcut changes nothing: blobs in corners, in the middle, nowhere, everywhere."""
    logits = np.full((5, 16, 16), -1.0, np.float32)
    logits[0, :2, :2] = 2.7  # not 3: nothing interpolates to exactly 0
    logits[1, -1, -1] = 2.7
    logits[2, 7:9, 4] = 2.7
    logits[4] = 1
    expected = torch.nn.functional.interpolate(
        torch.tensor(logits)[:, None], (75, 90), mode="bilinear", align_corners=False
    )[:, 0].numpy()
    np.testing.assert_array_equal(postprocess.upscale_masks(logits, (75, 90)), expected > 0)


def test_no_mask_gives_an_empty_array_of_the_right_size():
    found = postprocess.detections(
        np.zeros(0), np.zeros((0, 4)), np.zeros((0, 32, 32), np.float32), (20, 30)
    )
    assert found.masks.shape == (0, 20, 30)
    assert found.boxes.shape == (0, 4)
    assert found.scores.shape == (0,)


def test_many_masks_on_a_4k_picture_need_little_beside_the_result(rng):
    logits = smooth_logits(rng, 8, 288)
    tracemalloc.start()
    masks = postprocess.upscale_masks(logits, (2160, 3840))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert masks.any(axis=(1, 2)).all()
    # One mask's rows at low resolution height (288 x 3840 float32, three of them) and a block.
    assert peak - masks.nbytes < 40e6


def test_holes_are_filled_as_upstream_does(rng):
    logits = smooth_logits(rng, 4, 96)
    logits += np.where(rng.random(logits.shape) < 0.02, -8, 0).astype(np.float32)  # pinholes
    expected = logits.copy()
    for mask in expected:  # connected components of another library, 8-connected
        labels = skimage.measure.label(mask <= 0, connectivity=2)
        for region in skimage.measure.regionprops(labels):
            if region.area <= 60:
                mask[labels == region.label] = 10.0
    assert (expected != logits).any()
    np.testing.assert_array_equal(postprocess.fill_holes(logits, 60), expected)


@pytest.mark.parametrize(("side", "largest"), [(288, 16), (144, 8), (96, 5)])
def test_the_largest_hole_that_is_filled_goes_with_the_size_of_masks(side, largest):
    """Upstream's 256 pixels, 16 x 16, of 288 x 288."""
    logits = np.ones((1, side, side), np.float32)
    logits[0, 1 : 1 + largest, 1 : 1 + largest] = -1
    assert (postprocess.fill_holes(logits) > 0).all()
    logits[0, 1 : 2 + largest, 1 : 1 + largest] = -1
    np.testing.assert_array_equal(postprocess.fill_holes(logits), logits)


def test_holes_that_touch_at_a_corner_count_as_one():
    logits = np.ones((1, 64, 64), np.float32)
    logits[0, 0:16, 0:16] = -1  # 256 pixels: filled if alone
    logits[0, 40:56, 40:56] = -1
    logits[0, 56, 56] = 0  # a zero is background, and makes this one 257
    filled = postprocess.fill_holes(logits, 256)
    assert (filled[0, 0:16, 0:16] == 10).all()
    np.testing.assert_array_equal(filled[0, 40:57, 40:57], logits[0, 40:57, 40:57])
    assert (logits[0, 0:16, 0:16] == -1).all(), "the argument must stay as it is"


def test_concatenate_keeps_order_and_refuses_nothing():
    a = Detections(np.ones((2, 3, 4), bool), np.zeros((2, 4), np.float32), np.ones(2, np.float32))
    b = Detections(np.zeros((1, 3, 4), bool), np.ones((1, 4), np.float32), np.zeros(1, np.float32))
    both = postprocess.concatenate([a, b])
    np.testing.assert_array_equal(both.scores, [1, 1, 0])
    np.testing.assert_array_equal(both.masks.any((1, 2)), [True, True, False])
    with pytest.raises(ValueError, match="at least one prompt"):
        postprocess.concatenate([])


def test_masks_survive_run_length_encoding(rng):
    mask = rng.random((33, 57)) > 0.5
    encoded = json.loads(json.dumps(encode_mask(mask)))
    np.testing.assert_array_equal(coco_mask.decode(encoded), mask)


def test_a_mask_is_upscaled_around_its_object_only(rng):
    """Crops are the part of the whole mask that is not empty; without an object they are empty."""
    logits = np.full((2, 24, 32), -5.0, np.float32)
    logits[0, 5:9, 10:20] = rng.normal(1, 1, (4, 10))
    size = (100, 210)
    whole = upscale_masks(logits, size)
    crop, y, x = upscale_crop(logits[0], size)
    again = np.zeros(size, bool)
    again[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
    np.testing.assert_array_equal(again, whole[0])
    assert 0 < crop.size < whole[0].size / 4
    assert upscale_crop(logits[1], size)[0].size == 0


def test_boxes_can_come_from_the_masks(rng):
    logits = np.full((2, 16, 16), -3.0, np.float32)
    logits[0, 4:8, 2:12] = 3.0
    boxes = np.full((2, 4), 0.5, np.float32)
    found = detections(np.ones(2, np.float32), boxes, logits, (16, 16), boxes_from_masks=True)
    np.testing.assert_array_equal(found.boxes, [[2, 4, 12, 8], [0, 0, 0, 0]])
    placed = list(place(np.ones(2), boxes, logits, (16, 16), boxes_from_masks=True))
    np.testing.assert_array_equal([one.box for one in placed], found.boxes)
    predicted = list(place(np.ones(2), boxes, logits, (16, 16)))
    np.testing.assert_array_equal(predicted[0].box, [4, 4, 12, 12])


def test_annotations_end_at_the_image():
    box = np.asarray([-3, -2, 25, 8], np.float32)
    made = annotation("x", Placed(np.ones((4, 6), bool), 2, 3, box, 0.7), (10, 20))
    assert made["bbox"] == [0, 0, 20, 8]
    assert made["area"] == 24
    mask = decode_mask(made["segmentation"])
    assert mask.sum() == 24
    assert mask[2:6, 3:9].all()
