"""Tiles cover the picture, and what they cut apart is put together again exactly."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sam3_jax.inference.placed import Placed
from sam3_jax.inference.postprocess import Detections
from sam3_jax.inference.rle import decode_crop, encode_mask, rle_of_crop
from sam3_jax.inference.tiles import Window, merge_tiles, tile_grid, to_detections


def test_a_grid_by_hand():
    # 250 = 100 + 2 * 75: three columns with a quarter in common; one row, as high as the picture.
    assert tile_grid((80, 250), 100) == [(0, 0, 80, 100), (0, 75, 80, 175), (0, 150, 80, 250)]
    # one pixel more takes a fourth column, and all move closer together: 151 / 3
    assert [window[1] for window in tile_grid((80, 251), 100)] == [0, 50, 100, 151]
    assert tile_grid((60, 50), 100) == [(0, 0, 60, 50)]
    assert tile_grid((100, 100), 100) == [(0, 0, 100, 100)]
    assert tile_grid((100, 200), 100, 0.0) == [(0, 0, 100, 100), (0, 100, 100, 200)]


@pytest.mark.parametrize("size", [(97, 210), (333, 64), (64, 65), (1, 1), (40, 1000)])
@pytest.mark.parametrize("tile", [1, 33, 64])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.9])
def test_windows_cover_everything_evenly(size, tile, overlap):
    windows = tile_grid(size, tile, overlap)
    assert len(set(windows)) == len(windows)
    for axis in (0, 1):
        spans = sorted({(w[axis], w[axis + 2]) for w in windows})
        assert {end - start for start, end in spans} == {min(tile, size[axis])}
        assert (spans[0][0], spans[-1][1]) == (0, size[axis])
        steps = [b[0] - a[0] for a, b in itertools.pairwise(spans)]
        common = [a[1] - b[0] for a, b in itertools.pairwise(spans)]
        # A stride is a whole pixel at least: tiles of one pixel cannot overlap.
        assert all(c >= min(overlap * tile, tile - 1) for c in common)
        assert not steps or max(steps) - min(steps) <= 1
    rows, cols = {w[0] for w in windows}, {w[1] for w in windows}
    assert {w[:2] for w in windows} == set(itertools.product(rows, cols))


@pytest.mark.parametrize(
    ("size", "tile", "overlap", "message"),
    [
        ((0, 5), 8, 0.25, "at least 1 pixel"),
        ((5, 5), 0, 0.25, "at least 1 pixel"),
        ((5, 5), 8, 1.0, "below 1, got 1.0"),
        ((5, 5), 8, -0.1, "below 1, got -0.1"),
    ],
)
def test_impossible_grids_are_refused(size, tile, overlap, message):
    with pytest.raises(ValueError, match=message):
        tile_grid(size, tile, overlap)


def picture_of_objects(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Masks of disjoint objects: a river through the whole picture, a large disc, small discs."""
    y, x = np.mgrid[: size[0], : size[1]]
    river = np.abs(y - size[0] / 2 - 20 * np.sin(x / 25)) < 4
    large = (y - 45) ** 2 + (x - 150) ** 2 < 40**2
    taken, masks = river | large, [river, large & ~river]
    while len(masks) < 25:
        cy, cx, radius = rng.uniform(0, size[0]), rng.uniform(0, size[1]), rng.uniform(3, 9)
        disc = (y - cy) ** 2 + (x - cx) ** 2 < radius**2
        if not (disc & taken).any():
            masks.append(disc)
            taken |= disc
    return np.stack(masks)


def seen_in(masks: np.ndarray, window: Window, order: np.ndarray) -> Detections:
    """What a perfect detector finds in a window, in some order, scored by what it sees of it."""
    y0, x0, y1, x1 = window
    parts = masks[order, y0:y1, x0:x1]
    shares = parts.sum((1, 2)) / masks[order].sum((1, 2))
    parts, shares = parts[shares > 0], shares[shares > 0]
    boxes = [(xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) for ys, xs in map(np.nonzero, parts)]
    return Detections(parts, np.asarray(boxes, np.float32).reshape(-1, 4), shares)


@pytest.mark.parametrize("overlap", [0.1, 0.25, 0.6])
def test_objects_cut_by_tiles_come_back_whole(rng, overlap):
    size = (190, 260)
    masks = picture_of_objects(rng, size)
    windows = tile_grid(size, 64, overlap)
    found = [seen_in(masks, w, rng.permutation(len(masks))) for w in windows]
    assert sum(len(f.scores) for f in found) > 2 * len(masks)
    placed = merge_tiles(iter(found), windows, size)
    assert len(placed) == len(masks)
    scores = [p.score for p in placed]
    assert scores == sorted(scores, reverse=True)

    whole = to_detections(placed, size)
    for mask in masks:
        (i,) = np.flatnonzero((whole.masks == mask).all((1, 2)))
        ys, xs = np.nonzero(mask)
        expected = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        np.testing.assert_array_equal(whole.boxes[i], expected)
        best = max(mask[y0:y1, x0:x1].sum() for y0, x0, y1, x1 in windows) / mask.sum()
        np.testing.assert_allclose(whole.scores[i], best, rtol=1e-6)  # float32
        # And what is written to a results file is what the full mask would give.
        one = placed[i]
        assert rle_of_crop(one.mask, (one.y, one.x), size) == encode_mask(mask)
        assert one.mask.shape == (ys.max() + 1 - ys.min(), xs.max() + 1 - xs.min())


def test_masks_that_roughly_agree_are_joined_and_neighbours_are_not():
    """Two tiles of 10 x 20 with 10 columns in common; objects differ at their rims."""
    windows, size = [(0, 0, 10, 20), (0, 10, 10, 30)], (10, 30)
    left, right = np.zeros((2, 10, 20), bool), np.zeros((2, 10, 20), bool)
    left[0, 0:4, 8:20] = True  # in the common part: 4 x 10
    right[0, 0:3, 0:14] = True  # 3 x 10 of the same: IoU 30 / 40
    left[1, 6:10, 15:18] = True  # touches, but is not, ...
    right[1, 6:10, 8:12] = True  # ... columns 18 to 21 of the picture
    boxes = np.zeros((2, 4), np.float32)
    found = [Detections(left, boxes, np.asarray([0.6, 0.9]))]
    found += [Detections(right, boxes, np.asarray([0.8, 0.7]))]
    placed = merge_tiles(found, windows, size)
    assert [p.score for p in placed] == [0.9, 0.8, 0.7]
    assert [(p.y, p.x, *p.mask.shape) for p in placed] == [
        (6, 15, 4, 3),
        (0, 8, 4, 16),
        (6, 18, 4, 4),
    ]
    assert placed[1].mask.sum() == 4 * 12 + 3 * 14 - 30
    assert all(p.mask.base is None for p in placed), "a view would keep the tile's masks alive"
    # More than three quarters asked for: nothing is joined.
    assert len(merge_tiles(found, windows, size, threshold=0.75)) == 4
    assert len(merge_tiles(found, windows, size, threshold=0.74)) == 3


def test_iom_joins_a_stump():
    """One tile shows the object in full, the other detects the half of what it sees of it."""
    windows, size = [(0, 0, 10, 20), (0, 10, 10, 30)], (10, 30)
    left, right = np.zeros((1, 10, 20), bool), np.zeros((1, 10, 20), bool)
    left[0, 0:10, 4:20] = True
    right[0, 0:4, 0:10] = True
    box, score = np.zeros((1, 4), np.float32), np.asarray([0.9])
    found = [Detections(left, box, score), Detections(right, box, score)]
    assert len(merge_tiles(found, windows, size)) == 2  # IoU in the common part: .4
    (joined,) = merge_tiles(found, windows, size, measure="iom")
    assert joined.mask.all()
    assert joined.mask.shape == (10, 16)


def test_empty_masks_and_no_instances_pass_through():
    windows, size = tile_grid((8, 12), 8), (8, 12)
    none = Detections(np.zeros((0, 8, 8), bool), np.zeros((0, 4), np.float32), np.zeros(0))
    blank = Detections(np.zeros((1, 8, 8), bool), np.ones((1, 4), np.float32), np.ones(1))
    assert merge_tiles([none, none], windows, size) == []
    assert to_detections([], size).masks.shape == (0, 8, 12)
    assert to_detections([], size).boxes.shape == (0, 4)
    (only,) = merge_tiles([none, blank], windows, size)
    np.testing.assert_array_equal(only.box, [5, 1, 5, 1])  # moved by the window's 4 columns
    whole = to_detections([only], size)
    assert whole.masks.shape == (1, 8, 12)
    assert not whole.masks.any()
    assert rle_of_crop(only.mask, (only.y, only.x), size) == encode_mask(whole.masks[0])


def test_detections_that_do_not_fit_are_refused():
    windows, size = tile_grid((8, 12), 8), (8, 12)
    one = Detections(np.zeros((1, 8, 8), bool), np.zeros((1, 4), np.float32), np.ones(1))
    other = one._replace(masks=np.zeros((1, 8, 7), bool))
    with pytest.raises(ValueError, match=r"shape \(1, 8, 7\) do not fit window 2"):
        merge_tiles([one, other], windows, size)
    with pytest.raises(ValueError, match="do not fit window 2"):
        merge_tiles([one, one], windows, (8, 11))
    for wrong in ([one], [one] * 3):
        with pytest.raises(ValueError, match="there are 2 windows, but"):
            merge_tiles(wrong, windows, size)
    with pytest.raises(ValueError, match="one of iou, iom, got 'dice'"):
        merge_tiles([one, one], windows, size, measure="dice")
    placed = merge_tiles([one, one], windows, size)
    with pytest.raises(ValueError, match="2 masks of 8 x 12 pixels"):
        to_detections(placed, size, max_pixels=2 * 8 * 12 - 1)
    assert len(to_detections(placed, size, max_pixels=2 * 8 * 12).scores) == 2


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.95, 1.0])
@pytest.mark.parametrize(
    ("crop", "offset"),
    [
        ((5, 6), (3, 4)),
        ((5, 6), (0, 0)),
        ((5, 6), (12, 14)),  # the last pixel of the picture
        ((17, 6), (0, 4)),  # as high as the picture: runs go on from column to column
        ((17, 20), (0, 0)),
        ((5, 20), (6, 0)),
        ((1, 1), (16, 19)),
        ((0, 0), (3, 3)),
    ],
)
def test_run_lengths_are_those_of_the_full_mask(rng, crop, offset, density):
    size = (17, 20)
    for _ in range(5):
        mask = rng.random(crop) < density
        full = np.zeros(size, bool)
        full[offset[0] : offset[0] + crop[0], offset[1] : offset[1] + crop[1]] = mask
        rle = rle_of_crop(mask, offset, size)
        expected = coco_mask.encode(np.asfortranarray(full, np.uint8))
        assert rle["size"] == expected["size"]
        assert rle["counts"].encode() == expected["counts"]


def test_masks_are_unpacked_around_their_objects(rng):
    """Of any shape, runs over several columns and pieces that meet at the edges of them too."""
    for turn in range(300):
        size = tuple(rng.integers(1, 25, 2))
        mask = rng.random(size) < rng.random()
        mask[: rng.integers(0, size[0] + 1) * (turn % 2)] = False
        mask[:, : rng.integers(0, size[1] + 1) * (turn % 3 == 1)] = False
        crop, y, x = decode_crop(encode_mask(mask))
        unpacked = np.zeros(size, bool)
        unpacked[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
        np.testing.assert_array_equal(unpacked, mask)
        if not mask.any():
            assert crop.size == 0
    full = decode_crop(encode_mask(np.ones((7, 5), bool)))
    assert full[0].all()
    assert full[0].shape == (7, 5)


def test_a_small_object_of_a_huge_picture_is_unpacked_in_little_memory():
    """300 million pixels, of which the object has 10,000."""
    segmentation = rle_of_crop(np.ones((100, 100), bool), (14000, 19000), (15000, 20000))
    tracemalloc.start()
    crop, y, x = decode_crop(segmentation)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (y, x) == (14000, 19000)
    assert crop.shape == (100, 100)
    assert crop.all()
    assert peak < 1e6


@pytest.mark.parametrize("offset", [(-1, 0), (0, -1), (6, 0), (0, 6)])
def test_crops_outside_the_picture_are_refused(offset):
    with pytest.raises(ValueError, match="does not lie within a picture of 10 x 10"):
        rle_of_crop(np.ones((5, 5), bool), offset, (10, 10))


def test_a_huge_picture_needs_memory_for_the_objects_only():
    size = (20000, 15000)
    windows = tile_grid(size, 2016)
    assert len(windows) == 130

    def found():  # one object over the corner that four tiles share, the others find nothing
        for y0, x0, y1, x1 in windows:
            masks = np.zeros((1, y1 - y0, x1 - x0), bool)
            masks[
                0, max(1900 - y0, 0) : max(2100 - y0, 0), max(1800 - x0, 0) : max(2000 - x0, 0)
            ] = True
            kept = masks.any((1, 2))
            n = int(kept.sum())
            yield Detections(masks[kept], np.zeros((n, 4), np.float32), np.ones(n))

    tracemalloc.start()
    placed = merge_tiles(found(), windows, size)
    rles = [rle_of_crop(p.mask, (p.y, p.x), size) for p in placed]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [isinstance(p, Placed) for p in placed] == [True]
    assert coco_mask.area(rles[0]) == 200 * 200
    assert coco_mask.toBbox(rles[0]).tolist() == [1800, 1900, 200, 200]
    assert peak < 30e6  # two tiles' masks are 8 MB; the whole picture would be 300
