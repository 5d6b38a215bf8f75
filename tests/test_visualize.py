"""Overlays: what must hold of any picture, whatever it looks like."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import skimage.data
from PIL import ImageFont

from sam3_jax.inference import fonts, visualize
from sam3_jax.inference.postprocess import Detections


def discs(size: tuple[int, int], *circles: tuple[float, float, float]) -> Detections:
    """One disc (x, y, radius; fractions of the width) an instance, scores falling."""
    y, x = np.mgrid[: size[0], : size[1]] / size[1]
    masks = np.stack([(x - cx) ** 2 + (y - cy) ** 2 < r * r for cx, cy, r in circles])
    n = len(circles)
    boxes = np.asarray([[cx - r, cy - r, cx + r, cy + r] for cx, cy, r in circles]) * size[1]
    return Detections(masks, boxes.astype(np.float32), np.linspace(0.95, 0.6, n).astype("f4"))


def record_tags(monkeypatch) -> list:
    """Every tag's rectangle as it is placed."""
    places, place = [], visualize._place
    monkeypatch.setattr(
        visualize, "_place", lambda *args: places.append(place(*args)) or places[-1]
    )
    return places


def test_colors_differ_and_stay():
    colors = visualize.palette(40)
    assert visualize.palette(3) == colors[:3]
    for a, b in itertools.combinations(visualize.palette(10), 2):
        assert np.abs(np.subtract(a, b)).max() > 40
    assert len(set(colors)) == 40


def test_inside_is_tinted_outside_is_untouched():
    image = skimage.data.astronaut()
    found = discs(image.shape[:2], (0.3, 0.7, 0.1))
    drawn = visualize.overlay(image, found, show_scores=False)
    assert drawn.dtype == np.uint8
    assert drawn.shape == image.shape
    y, x = np.mgrid[:512, :512]
    away = (x - 0.3 * 512) ** 2 + (y - 0.7 * 512) ** 2 > (0.1 * 512 + 12) ** 2
    np.testing.assert_array_equal(drawn[away], image[away])
    well_inside = (x - 0.3 * 512) ** 2 + (y - 0.7 * 512) ** 2 < (0.1 * 512 - 12) ** 2
    color = np.asarray(visualize.palette(1)[0])
    expected = image + visualize.FILL * (color - image.astype(float))
    assert np.abs(drawn[well_inside] - expected[well_inside]).max() <= 1  # rounding


def test_outline_has_full_color_and_a_width_that_follows_the_picture():
    widths = []
    for side in (256, 2048):
        found = discs((side, side), (0.5, 0.5, 0.3))
        grey = np.full((side, side, 3), 128, np.uint8)
        drawn = visualize.overlay(grey, found, show_scores=False).astype(int)
        color = np.asarray(visualize.palette(1)[0])
        row = np.abs(drawn[side // 2] - color).max(axis=-1) < 40
        widths.append(row[: side // 2].sum())
    assert widths[0] >= 1
    assert 3 * widths[0] <= widths[1] <= 12 * widths[0]


def test_the_image_is_not_changed_and_no_instances_change_nothing():
    image = skimage.data.coffee()
    before = image.copy()
    found = discs(image.shape[:2], (0.5, 0.3, 0.1))
    visualize.overlay(image, found, "cup")
    np.testing.assert_array_equal(image, before)
    none = Detections(*(field[:0] for field in found))
    np.testing.assert_array_equal(visualize.overlay(image, none, "cup"), image)


@pytest.mark.parametrize("size", [(300, 200), (1500, 6000)])
def test_tags_are_inside_apart_and_readable(size, monkeypatch):
    places = record_tags(monkeypatch)
    circles = [(0.0, 0.0, 0.05), (1.0, 0.1, 0.05), (0.5, 0.05, 0.08), (0.5, 0.06, 0.05)]
    visualize.overlay(np.zeros((*size, 3), np.uint8), discs(size, *circles), "a cup")
    assert len(places) == 4
    for a in places:
        assert 0 <= a.x0 < a.x1 <= size[1]
        assert 0 <= a.y0 < a.y1 <= size[0]
        assert a.y1 - a.y0 >= max(13, 0.015 * min(size))
    for a, b in itertools.combinations(places, 2):
        assert visualize._overlap(a, b) == 0


def test_a_crowd_keeps_the_picture_visible(monkeypatch):
    places = record_tags(monkeypatch)
    circles = [(x, y, 0.03) for x in np.linspace(0.1, 0.9, 8) for y in np.linspace(0.1, 0.9, 8)]
    visualize.overlay(np.zeros((200, 200, 3), np.uint8), discs((200, 200), *circles), "thing")
    areas = [(r.x1 - r.x0) * (r.y1 - r.y0) for r in places]
    assert 0 < sum(areas) <= visualize.TAG_SHARE * 200 * 200


def test_tiny_pictures_and_long_texts_work():
    for size in ((1, 1), (5, 9), (20, 30)):
        found = discs(size, (0.5, 0.3, 0.4))
        drawn = visualize.overlay(np.zeros((*size, 3), np.uint8), found, "a very long phrase " * 5)
        assert drawn.shape == (*size, 3)
    font = ImageFont.load_default(12)
    short = visualize._shorten("a very long phrase 0.91", font, 80)
    assert short.startswith("a v")
    assert short.endswith("... 0.91")
    assert font.getlength(short) <= 80
    assert visualize._shorten("cup 0.91", font, 80) == "cup 0.91"
    assert visualize._shorten("cup 0.91", font, 5) == ""


def test_500_words_take_no_time_and_little_room(monkeypatch):
    """Measuring ever shorter pieces of such a text took 10 s a label."""
    places = record_tags(monkeypatch)
    found = discs((300, 400), *[(x, 0.4, 0.1) for x in (0.2, 0.5, 0.8)])
    start = time.process_time()
    visualize.overlay(np.zeros((300, 400, 3), np.uint8), found, "word " * 500)
    assert time.process_time() - start < 2  # 0.02 s
    assert len(places) == 3
    assert all(rect.x1 - rect.x0 <= 0.6 * 400 for rect in places)


def test_labels_in_other_scripts_show_no_empty_boxes():
    """What no font has is left out, lines become one, the score always stays."""
    for text, known in (
        ("größe 0.91", True),
        ("two\nlines 0.91", True),
        ("\U0010fffe 0.91", False),
    ):
        font, shown = fonts.font_for(text, 20.0)
        assert shown == (" ".join(text.split()) if known else "0.91")
        assert all(fonts._shows(font, c) for c in shown)
    found = discs((60, 90), (0.5, 0.3, 0.2))
    for label in ("🐈", "红色的猫", "two\nlines", "\x1b[31mred"):
        visualize.overlay(np.zeros((60, 90, 3), np.uint8), found, label)


def test_empty_masks_have_no_tag(monkeypatch):
    places = record_tags(monkeypatch)
    found = discs((50, 50), (0.5, 0.5, 0.2), (5.0, 5.0, 0.1))
    assert not found.masks[1].any()
    visualize.overlay(np.zeros((50, 50, 3), np.uint8), found)
    assert len(places) == 1


def test_text_contrasts_with_its_tag():
    assert visualize._ink((255, 200, 10)) == (0, 0, 0)
    assert visualize._ink((60, 20, 160)) == (255, 255, 255)


def test_what_does_not_fit_is_refused():
    image = np.zeros((20, 30, 3), np.uint8)
    with pytest.raises(ValueError, match="do not fit"):
        visualize.overlay(image, discs((30, 20), (0.5, 0.5, 0.2)))
    with pytest.raises(ValueError, match="3 labels for 1 instances"):
        visualize.overlay(image, discs((20, 30), (0.5, 0.3, 0.2)), ["a", "b", "c"])
