"""Concept tracking's functions of masks: worked by hand, and against scipy and plain loops."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from sam3_jax.tracking.concepts.cleaning import FILLED, REMOVED, clean_masks, small_components
from sam3_jax.tracking.concepts.config import ConceptConfig, check, sam3, sam3_1
from sam3_jax.tracking.concepts.detections import greedy_nms, keep_detections, within_margin
from sam3_jax.tracking.concepts.outputs import mask_boxes, output_logits, resolve
from sam3_jax.tracking.concepts.overlap import mask_areas, mask_overlap
from sam3_jax.tracking.concepts.shrinkage import (
    areas_before_and_after,
    encoder_masks,
    memory_masks,
)

EIGHT = np.ones((3, 3), bool)

# Programs of their own compile faster than one for each operation.
overlap = jax.jit(mask_overlap, static_argnames="measure")
nms = jax.jit(greedy_nms)


def bars(*spans: tuple[int, int], width: int = 20) -> np.ndarray:
    """One-row masks, true from the first to before the last column of each span."""
    masks = np.zeros((len(spans), 1, width), bool)
    for mask, (start, stop) in zip(masks, spans, strict=True):
        mask[0, start:stop] = True
    return masks


def logits(masks: np.ndarray) -> jax.Array:
    return jnp.where(jnp.asarray(masks), 4.0, -4.0)


def picture(*rows: str) -> np.ndarray:
    return np.asarray([[c == "#" for c in row] for row in rows])


# -------------------------------------------------------------------------------- overlap, NMS


def test_overlap_is_common_over_union_or_over_the_smaller():
    masks = jnp.asarray(bars((0, 10), (5, 20), (5, 8), (0, 0)))
    iou, iom = overlap(masks, masks), overlap(masks, masks, measure="iom")
    np.testing.assert_allclose(iou[0], [1, 5 / 20, 3 / 10, 0], rtol=1e-6)  # float32 divisions
    np.testing.assert_allclose(iom[0], [1, 5 / 10, 1, 0], rtol=1e-6)
    np.testing.assert_array_equal(iom[3], 0)
    assert mask_areas(masks).tolist() == [10, 15, 3, 0]
    with pytest.raises(ValueError, match="one of iou, iom, got 'dice'"):
        mask_overlap(masks, masks, "dice")


def test_overlaps_of_many_masks_are_counted_exactly(rng):
    a, b = rng.random((19, 13, 17)) < 0.4, rng.random((5, 13, 17)) < 0.6
    common = (a[:, None] & b[None]).sum((2, 3))
    union = (a[:, None] | b[None]).sum((2, 3))
    iou, iom = (overlap(jnp.asarray(a), jnp.asarray(b), measure=name) for name in ("iou", "iom"))
    np.testing.assert_allclose(iou, common / union, rtol=1e-6)
    smaller = np.minimum(a.sum((1, 2))[:, None], b.sum((1, 2))[None])
    np.testing.assert_allclose(iom, common / smaller, rtol=1e-6)


def test_nms_by_hand():
    # Neighbours share 2 of 6 pixels. The middle one is dropped by the best and drops nothing.
    masks = jnp.asarray(bars((0, 4), (2, 6), (4, 8), (10, 14)))
    iou, scores = overlap(masks, masks), jnp.asarray([0.9, 0.8, 0.7, 0.4])
    everything = jnp.ones(4, bool)
    assert nms(iou, scores, everything, 0.3).tolist() == [True, False, True, True]
    assert nms(iou, scores, everything, 0.34).tolist() == [True] * 4
    no_best = jnp.asarray([False, True, True, True])  # not a candidate: drops nobody
    assert nms(iou, scores, no_best, 0.3).tolist() == [False, True, False, True]
    equal = jnp.full(4, 0.5)
    assert nms(iou, equal, everything, 0.3).tolist() == [True, False, True, True]


def test_nms_is_the_definition(rng):
    shared = rng.random((60, 60))
    shared = np.maximum(shared, shared.T)
    scores = rng.permutation(60) / 60
    candidates = rng.random(60) < 0.7
    kept: list[int] = []
    for i in np.argsort(-scores):
        if candidates[i] and all(shared[i, j] <= 0.7 for j in kept):
            kept.append(int(i))
    actual = nms(jnp.asarray(shared), jnp.asarray(scores), jnp.asarray(candidates), 0.7)
    assert np.flatnonzero(actual).tolist() == sorted(kept)
    assert 1 < len(kept) < candidates.sum()


def test_kept_detections_by_preset():
    masks = logits(bars((0, 10), (0, 5), (12, 14), (16, 20)))
    boxes = jnp.asarray([[0.2, 0.2, 0.8, 0.8]] * 3 + [[0.0, 0.4, 0.05, 0.6]])
    scores = jnp.asarray([0.9, 0.8, 0.45, 0.8])

    def kept(config: ConceptConfig) -> list[bool]:
        return jax.jit(partial(keep_detections, config))(scores, masks, boxes).tolist()

    # Half of the first is the second: IoU .5. The third is between the two thresholds.
    assert kept(sam3()) == [True, False, False, True]
    assert kept(sam3_1()) == [True, False, True, False]
    assert kept(ConceptConfig(nms_overlap=0.6)) == [True, True, False, True]
    assert kept(ConceptConfig(nms_overlap=0.6, nms_measure="iom")) == [True, False, False, True]
    assert kept(ConceptConfig(nms_overlap=0.0)) == [True, True, False, True]


def test_margin_is_about_the_centre():
    boxes = jnp.asarray([[0, 0, 1, 0.04], [0, 0, 0.06, 1], [0.96, 0, 1, 1], [0.2, 0.2, 0.3, 0.3]])
    assert within_margin(boxes, 0.025).tolist() == [False, True, False, True]


def test_presets_are_told_apart_and_nonsense_is_refused():
    for config in (sam3(), sam3_1()):
        check(config)
    assert sam3_1().max_objects == 16
    with pytest.raises(ValueError, match="hotstart_unmatched is 9, which no masklet reaches"):
        check(ConceptConfig(hotstart=8, hotstart_unmatched=9))
    with pytest.raises(ValueError, match="match_measure must be one of iou, iom, got 'giou'"):
        check(ConceptConfig(match_measure="giou"))
    with pytest.raises(ValueError, match="max_objects must be at least 1, got 0"):
        check(ConceptConfig(max_objects=0))
    with pytest.raises(ValueError, match="bucket_size must be at least 1, got 0"):
        check(ConceptConfig(bucket_size=0))


# ---------------------------------------------------------------------------------- cleaning


def components(masks: np.ndarray) -> np.ndarray:
    """Area of every pixel's component, 0 outside; by scipy."""
    areas = np.zeros(masks.shape, int)
    for area, mask in zip(areas, masks, strict=True):
        labels = scipy.ndimage.label(mask, EIGHT)[0]
        area[:] = np.where(mask, np.bincount(labels.ravel())[labels], 0)
    return areas


small_to_16 = jax.jit(partial(small_components, max_area=16))


@pytest.mark.parametrize("density", [0.15, 0.3, 0.5])
def test_small_components_are_scipys(rng, density):
    masks = rng.random((4, 40, 37)) < density
    masks[0, 5, 3:30] = True  # a long line, whose ends do not hear of each other
    areas = components(masks)
    limit = np.asarray([16, 9, 3, 0], np.int32)
    actual = small_to_16(jnp.asarray(masks), limit=jnp.asarray(limit))
    expected = masks & (areas <= limit[:, None, None])
    np.testing.assert_array_equal(actual, expected)
    assert expected.any()
    assert (areas > 16).any()


def test_a_snake_of_just_the_area_and_one_longer():
    snake = picture(
        "#.......",
        ".#..##..",
        "..#.#.#.",
        "..#.#..#",
        "..#.#..#",
        "...#....",
    )
    longer = snake.copy()
    longer[5, 7] = True
    masks, limit = jnp.asarray([snake, longer]), jnp.full(2, 99, jnp.int32)
    assert masks.sum((1, 2)).tolist() == [14, 15]
    small = jax.jit(partial(small_components, max_area=14))(masks, limit=limit)
    assert small.sum((1, 2)).tolist() == [14, 0]


cleaned_to_8 = jax.jit(partial(clean_masks, max_area=8))


def test_cleaning_by_hand():
    mask = picture(
        "#####.....",
        "#...#...#.",
        "#.#.#.....",
        "#...#..##.",
        "#####..##.",
        "..........",
        ".........#",
    )
    solid = mask.copy()
    solid[2, 2] = False  # a hole of 9
    image = np.where([mask, solid], np.float32(5), np.float32(-5))
    cleaned = np.asarray(cleaned_to_8(jnp.asarray(image)))
    # The ring's hole (8 pixels) is filled, which also joins the dot inside to it; the other's is
    # too large. Of the specks two have one pixel and one has four.
    filled, removed = np.float32(FILLED), np.float32(REMOVED)
    expected = image.copy()
    expected[0, 1:4, 1:4] = filled
    expected[0, 2, 2] = 5
    for y, x in ((1, 8), (6, 9)):
        expected[:, y, x] = removed
    expected[:, 3:5, 7:9] = removed
    np.testing.assert_array_equal(cleaned, expected)


def test_a_speck_has_at_most_half_of_the_area():
    blank = [".........."] * 4
    mask = np.stack(
        [
            picture("###.......", "..........", "......###.", *blank),
            picture("##........", "..........", "......###.", *blank),  # half of 5 is 2
        ]
    )
    cleaned = cleaned_to_8(jnp.where(jnp.asarray(mask), 1.0, -1.0))
    assert (cleaned > 0).sum((1, 2)).tolist() == [0, 3], "two equal halves both go"
    alone = np.zeros_like(mask)
    alone[:, 3, 3] = True
    alone = jnp.where(jnp.asarray(alone), 1.0, -1.0)
    assert (cleaned_to_8(alone) > 0).sum((1, 2)).tolist() == [1, 1]
    assert clean_masks(alone, 0) is alone


# ------------------------------------------------------------------------- shrinking, memory


def naive_areas(masks: np.ndarray, phrases: np.ndarray, ids: np.ndarray, size: tuple[int, int]):
    """Full maps and an argmax per phrase, rows in the order of their identities."""
    large = np.asarray(jax.image.resize(masks, (len(masks), *size), "bilinear", antialias=False))
    before, after = np.zeros(len(masks), int), np.zeros(len(masks), int)
    for phrase in set(phrases[ids >= 0].tolist()):
        rows = np.flatnonzero((phrases == phrase) & (ids >= 0))
        rows = rows[np.argsort(ids[rows])]
        owner = rows[large[rows].argmax(0)]
        for row in rows:
            before[row] = (large[row] > 0).sum()
            after[row] = ((large[row] > 0) & (owner == row)).sum()
    return before, after


def test_areas_are_those_of_the_argmax(rng):
    masks = scipy.ndimage.gaussian_filter(rng.standard_normal((7, 24, 20)), (0, 2, 2))
    masks = masks.astype(np.float32)
    masks[5] = masks[2]  # ties
    phrases = np.asarray([3, 0, 3, 0, 3, 3, 3], np.int32)
    ids = np.asarray([9, 4, 7, 1, -1, 2, 3], np.int32)
    size = (96, 80)  # not a multiple of the rows that are taken at a time
    measure = jax.jit(partial(areas_before_and_after, size=size))
    before, after = measure(jnp.asarray(masks), jnp.asarray(phrases), jnp.asarray(ids))
    expected = naive_areas(masks, phrases, ids, size)
    # An interpolated logit of exactly 0 could round either way; none of these is.
    np.testing.assert_array_equal(before, expected[0])
    np.testing.assert_array_equal(after, expected[1])
    assert after[5] > 0
    assert after[2] == 0, "of equal masks the lower identity takes all"


def test_masks_that_others_take_are_capped():
    grid = np.full((4, 4, 8), -6.0, np.float32)
    grid[0, :, :6] = 2.0  # 4 of its 6 columns are taken by the next one: a third remains
    grid[1, :, 2:8] = 3.0
    grid[2, :, 0:5] = 1.0  # of another phrase
    # The fourth is empty.
    phrases, ids = jnp.asarray([0, 0, 1, 0]), jnp.arange(4)
    none = jnp.zeros(4, bool)
    make = jax.jit(partial(memory_masks, phrases=phrases, ids=ids, size=(4, 8)))
    keep = make(jnp.asarray(grid), none, shrink_ratio=0.3)
    assert keep.capped.tolist() == [False, False, False, True]
    less = make(jnp.asarray(grid), none, shrink_ratio=0.34)
    assert less.capped.tolist() == [True, False, False, True]
    np.testing.assert_array_equal(less.logits, grid)
    encoded = np.asarray(encoder_masks(less, (4, 8)))
    assert encoded[0].max() == -10
    assert encoded[3].max() == -10
    np.testing.assert_array_equal(encoded[1:3], grid[1:3])
    # Suppressed by occlusion, the second takes nothing from the first any more.
    gone = make(jnp.asarray(grid), jnp.asarray([False, True, False, False]), shrink_ratio=0.34)
    assert gone.capped.tolist() == [False, True, False, True]
    assert (gone.logits[1] == -10).all()
    assert encoder_masks(gone, (8, 16)).shape == (4, 8, 16)


# ------------------------------------------------------------------------------------ outputs


def test_pixels_go_to_the_best_of_the_phrase_and_boxes_are_taken_before():
    masks = jnp.asarray(bars((0, 10), (6, 16), (4, 8), (0, 20), (8, 9)))
    scores = jnp.asarray([0.5, 0.9, 0.5, 0.3, 0.99])
    phrases = jnp.asarray([0, 0, 0, 1, 0])
    ids = jnp.asarray([12, 3, 5, 4, 6])
    shown = jnp.asarray([True, True, True, True, False])
    found = jax.jit(resolve)(masks, scores, phrases, ids, shown)
    expected = bars((0, 4), (6, 16), (4, 6), (0, 20), (0, 0))  # 5 is before 12 at equal scores
    np.testing.assert_array_equal(found.masks, expected)
    assert found.boxes[:4, 0].tolist() == [0, 6, 4, 0]
    assert found.boxes[:4, 2].tolist() == [10, 16, 8, 20]
    assert found.boxes[4].tolist() == [0, 0, 0, 0]
    assert found.shown.tolist() == [True, True, True, True, False]


def test_output_takes_rows_as_they_are_and_cleans_detections():
    speck = picture("###.......", "###.....#.", "..........")
    tracks = jnp.stack([logits(speck), logits(~speck)])
    found = jnp.stack([logits(~speck), logits(speck), logits(speck)])
    make = jax.jit(partial(output_logits, ConceptConfig(clean_area=4)))
    old, new = jnp.asarray([1, 0, -1, -1]), jnp.asarray([-1, -1, 2, -1])
    masks = np.asarray(make(tracks, found, old, new))
    np.testing.assert_array_equal(masks[:2], tracks[::-1])
    cleaned = np.where(speck, np.float32(4), np.float32(-4))
    cleaned[1, 8] = np.float32(REMOVED)
    np.testing.assert_array_equal(masks[2], cleaned)
    assert (masks[3] == -10).all()
    nothing_new = make(tracks, found, old, jnp.full(4, -1))
    np.testing.assert_array_equal(nothing_new[2:], np.full((2, 3, 10), -10, np.float32))


def test_boxes_are_tight_edges():
    masks = np.zeros((3, 6, 9), bool)
    masks[0, 2:4, 3:8] = True
    masks[1, 5, 0] = masks[1, 0, 8] = True
    assert jax.jit(mask_boxes)(jnp.asarray(masks)).tolist() == [
        [3, 2, 8, 4],
        [0, 0, 9, 6],
        [0, 0, 0, 0],
    ]
