"""Automatic masks: every filter by hand, and the whole on pictures of painted discs."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import scipy.ndimage
import skimage.measure
from pycocotools import mask as coco_mask

from sam3_jax.data.images import ImageError
from sam3_jax.inference.automask import AutomaticMaskGenerator, stability_scores
from sam3_jax.inference.crops import crop_boxes, near_crop_edge, point_grid
from sam3_jax.inference.postprocess import upscale_masks
from sam3_jax.inference.small_regions import remove_small_regions

SIDE = 96  # of the fake predictor's masks


class PaintPredictor:
    """Segments the evenly coloured region that is clicked on, seen at low resolution.

    Its three hypotheses: the region (rated .95, .6 for the black background), its inner part
    (rated .9, but it fades out slowly, so it is not stable), and everything (rated .5). In every
    further image regions are rated .001 higher.
    """

    def __init__(self):
        self.images, self.batches = [], []

    def set_image(self, image: np.ndarray) -> None:
        self.images.append(image)
        # Centres of the low-resolution pixels, nearest pixel of the image.
        ys, xs = (((np.arange(SIDE) + 0.5) / SIDE * n).astype(int) for n in image.shape[:2])
        self.small, self.answers = image[np.ix_(ys, xs)], {}

    def predict_point_batch(self, points, *, multimask=True):
        self.batches.append((points, multimask))
        colors = [tuple(self.images[-1][int(y), int(x)].tolist()) for x, y in points]
        for color in set(colors) - set(self.answers):
            self.answers[color] = self.answer(color)
        logits, iou = (np.stack(a) for a in zip(*(self.answers[c] for c in colors), strict=True))
        return (logits, iou) if multimask else (logits[:, :1], iou[:, :1])

    def answer(self, color: tuple[int, int, int]) -> tuple[np.ndarray, list[float]]:
        region = (self.small == color).all(-1)
        inside = scipy.ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
        outside = scipy.ndimage.distance_transform_edt(~region) if region.any() else 99.0
        distance = inside - outside
        everything = np.full_like(distance, 10)
        logits = np.stack([np.clip(10 * distance, -20, 20), 0.3 * (distance - 2), everything])
        rating = 0.95 + 0.001 * (len(self.images) - 1)
        return logits.astype(np.float32), [rating if any(color) else 0.6, 0.9, 0.5]


def paint(size: tuple[int, int], discs: list[tuple[int, int, int]]) -> tuple[np.ndarray, list]:
    """A black picture with discs (x, y, radius) of different colours, and their masks."""
    image, masks = np.zeros((*size, 3), np.uint8), []
    y, x = np.mgrid[: size[0], : size[1]]
    for i, (cx, cy, radius) in enumerate(discs):
        masks.append((y - cy) ** 2 + (x - cx) ** 2 < radius**2)
        image[masks[-1]] = (40 * (i % 6) + 20, 250 - 30 * i, 10 + i)
    return image, masks


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


def test_the_grid_is_at_the_centres_of_cells():
    np.testing.assert_allclose(point_grid(1), [[0.5, 0.5]])
    expected = [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]  # x runs first
    np.testing.assert_allclose(point_grid(2), expected)
    assert point_grid(32).shape == (1024, 2)


def test_crops_by_hand():
    # Layer 1: an overlap of 60 = .5 * 120; (200 + 60) / 2 wide, (120 + 60) / 2 high.
    whole = ((0, 0, 200, 120), 0)
    assert crop_boxes((120, 200), 0, 0.5) == [whole]
    first = [(0, 0, 130, 90), (0, 30, 130, 120), (70, 0, 200, 90), (70, 30, 200, 120)]
    assert crop_boxes((120, 200), 1, 0.5) == [whole, *((box, 1) for box in first)]
    # Layer 2: an overlap of 30; (200 + 90) / 4 = 72.5 wide, rounded up; (120 + 90) / 4 high.
    crops = crop_boxes((120, 200), 2, 0.5)
    assert [layer for _, layer in crops] == [0] + 4 * [1] + 16 * [2]
    assert crops[5] == ((0, 0, 73, 53), 2)
    assert crops[-1] == ((129, 69, 200, 120), 2)
    covered = np.zeros((120, 200), int)
    for (x0, y0, x1, y1), layer in crops:
        covered[y0:y1, x0:x1] += layer == 2
    assert covered.min() == 1


def test_tiny_images_have_no_empty_crops():
    for size in ((1, 1), (2, 3), (5, 1)):
        for (x0, y0, x1, y1), _ in crop_boxes(size, 3, 512 / 1500):
            assert 0 <= x0 < x1 <= size[1]
            assert 0 <= y0 < y1 <= size[0]


def test_stability_by_hand():
    logits = np.full((4, 4, 4), -9.0, np.float32)
    logits[0, :2] = 5  # 8 pixels at any threshold
    logits[1, 0], logits[1, 1:3] = 1.5, -0.5  # 4 above 1, 12 above -1
    logits[2, 0] = 1.0  # not above 1, but above -1
    scores = stability_scores(logits, 1.0)
    np.testing.assert_allclose(scores, [1, 1 / 3, 0, 0])  # the last one is empty
    np.testing.assert_allclose(stability_scores(logits, 0.25), [1, 1, 1, 0])


def test_boxes_cut_off_by_a_crop_but_not_by_the_image():
    size, crop = (600, 800), (0, 200, 400, 600)  # left and bottom edges are the image's
    boxes = [
        (100, 300, 200, 400),  # in the middle
        (0, 300, 200, 600),  # at the edges of the image
        (100, 300, 379, 400),  # 21 pixels from the crop's right edge
        (100, 300, 380, 400),  # 20
        (100, 220, 200, 400),  # 20 from its upper edge
        (100, 221, 200, 400),
    ]
    near = near_crop_edge(np.asarray(boxes, np.float32), crop, size)
    assert near.tolist() == [False, False, False, True, True, False]
    assert not near_crop_edge(np.asarray(boxes, np.float32), (0, 0, 800, 600), size).any()


def test_small_regions_by_hand():
    mask = np.zeros((12, 20), bool)
    mask[2:10, 2:10] = True
    mask[4:6, 4:6] = False  # a hole of 4
    mask[6, 6] = False  # ... and, over the corner, 5
    mask[8, 3] = False  # a hole of 1
    mask[3:5, 15] = True  # an island of 2
    mask[5, 16] = True  # ... of 3
    same, changed = remove_small_regions(mask, 1, "holes")
    assert same is mask
    assert not changed
    filled, changed = remove_small_regions(mask, 5, "holes")
    assert changed
    assert filled.sum() == mask.sum() + 1
    assert filled[8, 3]
    filled, _ = remove_small_regions(mask, 6, "holes")
    assert filled[2:10, 2:10].all()
    assert filled.sum() == 64 + 3
    assert remove_small_regions(mask, 3, "islands") == (mask, False)
    removed, changed = remove_small_regions(mask, 4, "islands")
    assert changed
    np.testing.assert_array_equal(removed, mask & (np.arange(20) < 10))
    # If all are small the largest stays.
    removed, _ = remove_small_regions(mask, 1000, "islands")
    np.testing.assert_array_equal(removed, mask & (np.arange(20) < 10))
    assert mask.sum() == 58 + 3, "the argument must stay as it is"


def test_the_surroundings_are_no_hole_but_a_corner_of_the_image_is_one():
    mask = np.ones((10, 10), bool)
    mask[0, 0] = False  # closed in by mask and image
    assert remove_small_regions(mask, 5, "holes")[0].all()
    mask = np.ones((10, 10), bool)
    mask[:, 9] = False  # ten pixels around the mask's box
    assert remove_small_regions(mask, 50, "holes") == (mask, False)
    empty = np.zeros((4, 4), bool)
    for mode in ("holes", "islands"):
        assert remove_small_regions(empty, 100, mode) == (empty, False)


@pytest.mark.parametrize("mode", ["holes", "islands"])
def test_small_regions_are_those_of_another_library(rng, mode):
    noise = scipy.ndimage.gaussian_filter(rng.normal(size=(3, 60, 70)), (0, 1.2, 1.2))
    noise[:, :, :9], noise[:, 50:] = -1, -1  # background around the box on two sides
    for mask in noise > 0.03:
        expected = mask.copy()
        labels = skimage.measure.label(mask ^ (mode == "holes"), connectivity=2)
        for region in skimage.measure.regionprops(labels):
            if region.area < 12:
                expected[labels == region.label] = mode == "holes"
        actual, changed = remove_small_regions(mask, 12, mode)
        assert changed
        assert (expected != mask).any()
        np.testing.assert_array_equal(actual, expected)


DISCS = [(60, 60, 30), (150, 50, 20), (230, 100, 40), (90, 150, 25), (170, 160, 18)]


@pytest.fixture(scope="module")
def scene():
    return paint((200, 300), DISCS)


def test_every_disc_is_found_once(scene):
    image, masks = scene
    predictor = PaintPredictor()
    generator = AutomaticMaskGenerator(predictor, points_per_side=12, points_per_batch=50)
    records = generator.generate(image)
    assert len(records) == len(masks), "neither background, nor parts, nor duplicates"
    for mask in masks:
        (record,) = (r for r in records if iou(r["segmentation"], mask) > 0.5)
        found = record["segmentation"]
        # Low-resolution pixels are 2.1 x 3.1 pixels: half of one along the rim of the smallest
        # disc is 2 * 1.3 / 18 of its area.
        assert iou(found, mask) > 0.86
        ys, xs = np.nonzero(found)
        box = [xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()]
        assert record["bbox"] == box
        assert record["area"] == found.sum()
        (x, y), *_ = record["point_coords"]
        assert mask[int(y), int(x)], "the click is on the disc"
        assert record["predicted_iou"] == 0.95
        assert record["stability_score"] >= 0.95
        assert record["crop_box"] == [0, 0, 300, 200]
    # The clicks: 144 in batches, in pixels of the image.
    assert [len(points) for points, _ in predictor.batches] == [50, 50, 44]
    points = np.concatenate([points for points, _ in predictor.batches])
    np.testing.assert_allclose(points, point_grid(12) * (300, 200))
    assert all(multimask for _, multimask in predictor.batches)


def test_filters_can_be_opened_and_one_hypothesis_asked_for(scene):
    image, masks = scene

    def generate(**settings):
        settings = {"points_per_side": 12, "box_nms_thresh": 0.9, **settings}
        return AutomaticMaskGenerator(PaintPredictor(), **settings).generate(image)

    # The background, rated .6, and everything, rated .5, have the same box: the better one stays.
    records = generate(pred_iou_thresh=0.55)
    assert [r["predicted_iou"] for r in records] == 5 * [0.95] + [0.6]
    np.testing.assert_array_equal(records[-1]["bbox"], [0, 0, 300, 200])
    assert iou(records[-1]["segmentation"], ~np.any(masks, axis=0)) > 0.95
    assert len(generate(pred_iou_thresh=0.0, box_nms_thresh=1.0)) > 6
    # The inner parts, rated .9, pass without the filter of stability; the largest discs have some.
    unstable = generate(stability_score_thresh=0.0, box_nms_thresh=0.99)
    assert {r["predicted_iou"] for r in unstable} == {0.95, 0.9}
    assert min(r["stability_score"] for r in unstable) < 0.95
    assert [r["predicted_iou"] for r in generate(multimask_output=False)] == 5 * [0.95]


def test_run_lengths_hold_the_same_masks(scene):
    image, _ = scene
    arrays = AutomaticMaskGenerator(PaintPredictor(), points_per_side=12).generate(image)
    rles = AutomaticMaskGenerator(
        PaintPredictor(), points_per_side=12, output_mode="coco_rle"
    ).generate(image)
    assert len(arrays) == len(rles) == len(DISCS)
    for one, other in zip(arrays, rles, strict=True):
        np.testing.assert_array_equal(coco_mask.decode(other["segmentation"]), one["segmentation"])
        assert {**one, "segmentation": 0} == {**other, "segmentation": 0}
        assert one["segmentation"].dtype == bool


def test_crops_find_what_the_whole_image_misses():
    """Small discs lie between the points of the coarse grid; a large one reaches into all crops."""
    size = (400, 400)
    # The whole image is clicked on at 20, 60, ...; crops of 268 and 151 pixels every 27 and 15.
    small = [(40, 40, 11), (320, 40, 11), (40, 320, 11), (360, 360, 11), (117, 40, 11)]
    discs = [(200, 200, 90), (340, 160, 24), *small]
    image, masks = paint(size, discs)

    def generate(layers):
        predictor = PaintPredictor()
        generator = AutomaticMaskGenerator(predictor, points_per_side=10, crop_n_layers=layers)
        return generator.generate(image), predictor

    records, _ = generate(0)
    assert len(records) == 2, "the grid misses the small discs"
    records, predictor = generate(2)
    assert len(predictor.images) == 1 + 4 + 16
    assert predictor.images[-1].shape == image.shape, "the predictor holds the whole image"
    found = [[r for r in records if iou(r["segmentation"], mask) > 0.7] for mask in masks]
    assert [len(f) for f in found] == [1] * 7
    assert len(records) == 7, "pieces of the large disc that crops cut off are left out"
    for (record,), (cx, cy, radius) in zip(found, discs, strict=True):
        x, y, width, height = record["crop_box"]
        (px, py), *_ = record["point_coords"]
        assert x <= px < x + width
        assert y <= py < y + height
        assert (px - cx) ** 2 + (py - cy) ** 2 < radius**2, "the click in pixels of the image"
        # Crops of 151 pixels are the smallest; they win over the whole image that sees a disc too.
        assert width == (400 if radius == 90 else 151)
    # Of two crops that show all of a disc, (0, 0) and (83, 0), the one that is rated higher.
    assert found[-1][0]["crop_box"] == [0, 0, 151, 151]


def test_fewer_points_in_crops():
    predictor = PaintPredictor()
    AutomaticMaskGenerator(
        predictor, points_per_side=8, crop_n_layers=1, crop_n_points_downscale_factor=3
    ).generate(np.zeros((60, 60, 3), np.uint8))
    assert [len(points) for points, _ in predictor.batches] == 4 * [2 * 2] + [8 * 8]


class SpeckledPredictor:
    """One click gives three masks: a square, the same with a speck and pinhole, a far square."""

    def set_image(self, image: np.ndarray) -> None:
        self.size = image.shape[:2]

    def predict_point_batch(self, points, *, multimask=True):
        logits = np.full((1, 3, *self.size), -20, np.float32)
        logits[0, :2, 5:25, 5:25] = 20
        logits[0, 1, 10, 10] = -20
        logits[0, 1, 40:42, 40:42] = 20
        logits[0, 2, 40:60, 5:25] = 20
        logits[0, 2, 50, 10] = -20
        return logits, np.asarray([[0.9, 0.99, 0.85]])


def test_small_regions_go_and_so_do_the_duplicates_that_this_makes():
    image = np.zeros((64, 64, 3), np.uint8)
    before = AutomaticMaskGenerator(SpeckledPredictor(), points_per_side=1).generate(image)
    assert [r["area"] for r in before] == [399 + 4, 400, 399]
    after = AutomaticMaskGenerator(
        SpeckledPredictor(), points_per_side=1, min_mask_region_area=5
    ).generate(image)
    # The speckled square became the clean one: the one that was clean from the start stays.
    assert [(r["area"], r["predicted_iou"]) for r in after] == [(400, 0.9), (400, 0.85)]
    assert [r["bbox"] for r in after] == [[5, 5, 20, 20], [5, 40, 20, 20]]
    assert after[1]["segmentation"][40:60, 5:25].all()


def test_masks_without_a_pixel_are_left_out():
    """Low-resolution specks can vanish when a mask is scaled down to a tiny image."""

    class Speck(SpeckledPredictor):
        def predict_point_batch(self, points, *, multimask=True):
            logits = np.full((1, 1, 64, 64), -20, np.float32)
            logits[0, 0, 0, 0] = 20
            return logits, np.asarray([[0.9]])

    image = np.zeros((5, 5, 3), np.uint8)
    logits = Speck().predict_point_batch(None)[0][0]
    assert not upscale_masks(logits, (5, 5)).any()
    assert AutomaticMaskGenerator(Speck(), points_per_side=1).generate(image) == []


def test_a_4k_image_with_200_masks_stays_small():
    """64 clicks give 192 masks, each a square of its own; as arrays they would take 1.6 GB."""

    class Squares(SpeckledPredictor):
        def predict_point_batch(self, points, *, multimask=True):
            logits = np.full((64, 3, 96, 96), -20, np.float32)
            for i, mask in enumerate(logits.reshape(-1, 96, 96)):
                y, x = divmod(i, 16)
                mask[6 * y + 1 : 6 * y + 6, 6 * x + 1 : 6 * x + 6] = 20
            return logits, np.full((64, 3), 0.9)

    generator = AutomaticMaskGenerator(Squares(), points_per_side=8, output_mode="coco_rle")
    image = np.zeros((2160, 3840, 3), np.uint8)
    tracemalloc.start()
    records = generator.generate(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(records) == 192
    # 5 low-resolution pixels a side, 22.5 x 40 pixels each
    assert all(abs(r["area"] - 25 * 900) < 0.05 * 25 * 900 for r in records)
    assert peak < 150e6  # eight masks at full size are 66 MB, the image 25


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points_per_side": 0}, "points_per_side must be at least 1, got 0"),
        ({"points_per_batch": 0}, "points_per_batch must be at least 1"),
        ({"crop_n_points_downscale_factor": 0}, "downscale_factor must be at least 1"),
        ({"crop_n_layers": -1}, "crop_n_layers must not be negative"),
        ({"stability_score_offset": -1.0}, "stability_score_offset must not be negative"),
        ({"crop_overlap_ratio": 1.0}, "crop_overlap_ratio must be .* got 1.0"),
        ({"output_mode": "png"}, "one of binary_mask, coco_rle, got 'png'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AutomaticMaskGenerator(PaintPredictor(), **settings)


def test_an_image_that_cannot_be_read_is_named():
    with pytest.raises(ImageError, match="no such file"):
        AutomaticMaskGenerator(PaintPredictor()).generate("nowhere.jpg")
