"""Geometry agrees between image, masks and boxes; decisions respect phrases and recipes."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch
from skimage import data

from data_sets import ellipse
from oracle.torch_import import import_torchvision
from sam3_jax.data import augment
from sam3_jax.data.placement import (
    Placement,
    box_of_mask,
    is_cut,
    place_boxes,
    place_image,
    place_mask,
    resize_mask,
)

PHRASES = ["cat"]


def random_placement(size: tuple[int, int], canvas: int, rng: np.random.Generator) -> Placement:
    x0, y0 = (int(rng.integers(n // 2)) for n in size[::-1])
    x1, y1 = int(rng.integers(x0 + 20, size[1] + 1)), int(rng.integers(y0 + 20, size[0] + 1))
    tx, ty = (int(rng.integers(canvas // 2)) for _ in range(2))
    tx1, ty1 = (int(rng.integers(t + 30, canvas + 1)) for t in (tx, ty))
    return Placement((x0, y0, x1, y1), bool(rng.random() < 0.5), (tx, ty, tx1, ty1))


def test_a_placement_is_what_torchvision_does_step_by_step(rng):
    import_torchvision()
    from torchvision import tv_tensors
    from torchvision.transforms.v2 import functional as tv

    image = data.chelsea()[::2, ::2]
    size = image.shape[:2]
    for _ in range(8):
        placement = random_placement(size, 128, rng)
        (x0, y0, x1, y1), (tx0, ty0, tx1, ty1) = placement.crop, placement.target
        low = rng.uniform(0, [size[1] - 5, size[0] - 5], (6, 2))
        boxes = np.concatenate([low, low + rng.uniform(1, 80, (6, 2))], axis=1)
        boxes = np.minimum(boxes, np.tile(size[::-1], 2))
        things = [
            torch.from_numpy(image.transpose(2, 0, 1).copy()),
            tv_tensors.BoundingBoxes(torch.from_numpy(boxes), format="XYXY", canvas_size=size),
        ]
        for step in range(4):
            if step == 0:
                things = [tv.crop(t, y0, x0, y1 - y0, x1 - x0) for t in things]
                things[1] = tv.clamp_bounding_boxes(things[1])
            elif step == 1 and placement.flip:
                things = [tv.horizontal_flip(t) for t in things]
            elif step == 2:
                things = [tv.resize(t, [ty1 - ty0, tx1 - tx0], antialias=True) for t in things]
            elif step == 3:
                things = [tv.pad(t, [tx0, ty0, 128 - tx1, 128 - ty1]) for t in things]
        canvas = np.zeros((128, 128, 3), np.uint8)
        place_image(canvas, image, placement)
        # Equal on AVX2 and ARM; elsewhere torchvision's other kernel rounds otherwise, by one.
        np.testing.assert_allclose(
            canvas.astype(int), things[0].numpy().transpose(1, 2, 0), rtol=0, atol=1
        )
        mine = place_boxes(boxes, placement)
        np.testing.assert_allclose(mine, things[1].numpy(), atol=1e-9)  # float64 both


def test_masks_and_boxes_agree(rng):
    """A box that fits its mask still fits after any placement, to the pixel that is rounded."""
    size = (150, 225)
    for _ in range(40):
        x, y = int(rng.integers(10, 150)), int(rng.integers(10, 80))
        w, h = (int(rng.integers(20, 70)) for _ in range(2))
        mask = np.zeros(size, bool)
        mask[y : y + h, x : x + w] = True
        placement = random_placement(size, 128, rng)
        placed = place_mask(mask, placement, (128, 128))
        source_box = np.array([x, y, min(x + w, size[1]), min(y + h, size[0])], float)
        (box,) = place_boxes(source_box[None], placement)
        tight = box_of_mask(placed)
        if tight is None:
            assert (box[2:] - box[:2]).min() <= 1
        else:
            np.testing.assert_allclose(tight, box, atol=0.51)  # pixels covered by half
        x0, y0, x1, y1 = placement.crop
        outside = x < x0 or y < y0 or source_box[2] > x1 or source_box[3] > y1
        assert is_cut(source_box, placement) == outside


def test_masks_follow_the_image(rng):
    """A picture that is white where its mask is: after a placement its white is the mask."""
    mask = ellipse((150, 225), (30, 20, 120, 100))
    image = np.repeat(mask[..., None], 3, 2).astype(np.uint8) * 255
    for _ in range(10):
        placement = random_placement(mask.shape, 128, rng)
        canvas = np.zeros((128, 128, 3), np.uint8)
        place_image(canvas, image, placement)
        placed = place_mask(mask, placement, (128, 128))
        # Two resizers round pixels that are covered by one half to either side.
        assert (placed != (canvas[..., 0] >= 128)).mean() < 1e-3


def test_small_masks():
    assert box_of_mask(np.zeros((4, 4), bool)) is None
    mask = np.zeros((64, 64), bool)
    mask[3, 5] = True
    assert box_of_mask(mask).tolist() == [5, 3, 6, 4]
    assert not resize_mask(mask, (8, 8)).any()  # 1 of 64 pixels covered
    assert resize_mask(mask, (64, 64)) is mask


@pytest.mark.parametrize("size", [(256, 256), (300, 211), (17, 240), (1, 3)])
@pytest.mark.parametrize("target", [(48, 48), (192, 256), (400, 30), (101, 7)])
def test_masks_are_resized_around_what_is_in_them(size, target, rng):
    """As the whole picture would be, but for pixels on the threshold, which rounding turns."""
    for _ in range(20):
        mask = np.zeros(size, bool)
        (y0, y1), (x0, x1) = (sorted(rng.integers(0, n + 1, 2)) for n in size)
        mask[y0:y1, x0:x1] = rng.random((y1 - y0, x1 - x0)) < rng.random()
        picture = PIL.Image.fromarray(mask.astype(np.uint8) * 255)
        whole = np.asarray(picture.resize(target[::-1], PIL.Image.Resampling.BILINEAR))
        differs = resize_mask(mask, target) != (whole >= 128)
        assert np.abs(whole[differs].astype(int) - 128).max(initial=0) <= 1


def test_released_recipe(rng):
    config = augment.released()
    sides, offsets = set(), []
    for _ in range(400):
        assert augment.draw_grid(config, rng) == (1, 1)
        (placement,) = augment.draw_placements([(300, 400)], (1, 1), PHRASES, config, rng)
        assert placement.crop == (0, 0, 400, 300)
        assert not placement.flip
        x0, y0, x1, y1 = placement.target
        assert x1 - x0 == y1 - y0
        assert min(x0, y0) >= 0
        assert max(x1, y1) <= 1008
        sides.add(x1 - x0)
        offsets.append((x0, y0))
    assert sides == set(range(480, 993, 32))
    assert len({x for x, _ in offsets}) > 100
    assert any(x != y for x, y in offsets)
    image = data.chelsea()
    np.testing.assert_array_equal(augment.jitter_colors(image, PHRASES, config, rng), image)


def test_paper_variant(rng):
    config = augment.paper(252)
    draws = [augment.draw_grid(config, rng) for _ in range(2000)]
    many = [grid for grid in draws if grid != (1, 1)]
    assert len(many) / len(draws) == pytest.approx(0.15, abs=0.03)
    assert {rows * columns for rows, columns in many} == {2, 3, 4, 6, 9}
    flips, cuts = [], []
    for _ in range(300):
        (placement,) = augment.draw_placements([(300, 400)], (1, 1), PHRASES, config, rng)
        flips.append(placement.flip)
        x0, y0, x1, y1 = placement.crop
        cuts.append((x0, y0, x1, y1) != (0, 0, 400, 300))
        assert x1 - x0 >= 200
        assert y1 - y0 >= 150
    assert np.mean(flips) == pytest.approx(0.5, abs=0.1)
    assert np.mean(cuts) == pytest.approx(0.3, abs=0.1)
    image = data.chelsea()
    assert (augment.jitter_colors(image, PHRASES, config, rng) != image).any()


def test_a_mosaic_fills_its_square_without_overlap(rng):
    config = augment.paper(252)
    for grid in ((1, 2), (2, 3), (3, 3)):
        sizes = [(30, 40)] * (grid[0] * grid[1])
        placements = augment.draw_placements(sizes, grid, PHRASES, config, rng)
        covered = np.zeros((252, 252), int)
        for _, _, (x0, y0, x1, y1) in placements:
            covered[y0:y1, x0:x1] += 1
        assert covered.max() == 1
        rows, columns = np.flatnonzero(covered.any(1)), np.flatnonzero(covered.any(0))
        assert len(rows) == len(columns)
        assert covered.sum() == len(rows) ** 2


@pytest.mark.parametrize(
    ("phrase", "sided"),
    [
        ("left hand", True),
        ("car on the Right", True),
        ("leftmost cup", True),
        ("bright lamp", False),
        ("cup", False),
    ],
)
def test_phrases_with_sides_are_not_mirrored_or_cut(rng, phrase, sided):
    config = augment.paper(252)
    config.flip = config.crop = 1.0
    assert augment.is_sided([phrase]) == sided
    phrases = ["dog", phrase]
    (placement,) = augment.draw_placements([(300, 400)], (1, 1), phrases, config, rng)
    assert placement.flip == (not sided)
    assert (placement.crop == (0, 0, 400, 300)) == sided


def test_named_colors_keep_their_hue(rng):
    image = np.full((8, 8, 3), (200, 40, 40), np.uint8)
    config = augment.AugmentConfig(hue=0.5)
    turned = [augment.jitter_colors(image, ["cup"], config, rng)[0, 0] for _ in range(20)]
    assert any(g > r for r, g, _ in turned)
    for phrase in ("red cup", "Grey coat", "colourful kite"):
        np.testing.assert_array_equal(augment.jitter_colors(image, [phrase], config, rng), image)


def test_plain_is_the_whole_picture(rng):
    (placement,) = augment.draw_placements([(30, 40)], (1, 1), [], augment.plain(252), rng)
    assert placement == Placement((0, 0, 40, 30), False, (0, 0, 252, 252))


def test_decisions_hang_on_the_generator_alone():
    config, image = augment.paper(252), data.chelsea()
    runs = []
    for _ in range(2):
        rng = np.random.default_rng(7)
        placements = augment.draw_placements([(300, 400)] * 4, (2, 2), PHRASES, config, rng)
        runs.append((placements, augment.jitter_colors(image, PHRASES, config, rng)))
    assert runs[0][0] == runs[1][0]
    np.testing.assert_array_equal(runs[0][1], runs[1][1])
