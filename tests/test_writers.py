"""Files beside the results: overlays, masks, probabilities, polygons for other programs."""

from __future__ import annotations

import errno
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import skimage.data
import skimage.draw
import skimage.measure
from PIL import Image

from sam3_jax.inference import placed, polygons, visualize, writers
from sam3_jax.inference.postprocess import Detections, sigmoid

SIZE = (90, 120)


def annotation(phrase: str, mask: np.ndarray, box: list[float], score: float) -> dict:
    one = placed.Placed(mask, 0, 0, np.asarray(box, np.float32), score)
    return placed.annotation(phrase, one, mask.shape)


def fill(ring: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The oracle: even-odd filling at the centres of pixels, by scikit-image."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    centres = np.stack([x.ravel(), y.ravel()], 1)
    return skimage.measure.points_in_poly(centres, ring).reshape(size)


def fill_parts(parts: list[polygons.Part], size: tuple[int, int]) -> np.ndarray:
    whole = np.zeros(size, bool)
    for part in parts:
        whole |= fill(polygons.join([part.outer, *part.holes]), size)
    return whole


def shapes() -> dict[str, np.ndarray]:
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    noise = np.random.default_rng(0).normal(size=SIZE)
    ring = np.abs(np.hypot(x - 60, y - 45) - 30) < 8
    disc = np.hypot(x - 60, y - 45) < 9
    dots = np.zeros(SIZE, bool)
    dots[0, 0] = dots[89, 119] = dots[40, 40:60] = dots[50:52, 50] = True
    np.fill_diagonal(dots[:40, 60:], val=True)
    return {
        "full": np.ones(SIZE, bool),
        "ring": ring,
        "island": ring | disc,  # a part in the hole of another
        "blobs": scipy.ndimage.gaussian_filter(noise, 4) > 0,
        "noise": (noise > 0.3) & (x < 40),
        "board": ((x + y) % 2 == 0) & (np.maximum(x, y) < 20),
        "slanted": (2 * x + 5 * y > 160) & (7 * x - 3 * y < 500),
        "dots": dots,
    }


@pytest.mark.parametrize("name", shapes())
def test_exact_outlines_give_back_the_mask(name):
    mask = shapes()[name]
    parts = polygons.mask_parts(mask, tolerance=0.0)
    np.testing.assert_array_equal(fill_parts(parts, SIZE), mask)
    _, pieces = scipy.ndimage.label(mask)
    assert len(parts) == pieces
    areas = [polygons.signed_area(part.outer) for part in parts]
    assert areas == sorted(areas, reverse=True)
    assert areas[-1] > 0  # clockwise
    holes = [polygons.signed_area(hole) for part in parts for hole in part.holes]
    assert all(area < 0 for area in holes)
    assert sum(areas) + sum(holes) == mask.sum()


@pytest.mark.parametrize("name", shapes())
def test_simple_outlines_change_pixels_at_the_edge_only(name):
    """An outline moved by less than 1.5 pixels reaches no pixel but those that touch the old one.

    Their centres are 0.5 (0.71 at a corner) away from it, those of the next ones at least 1.5.
    """
    mask = shapes()[name]
    parts = polygons.mask_parts(mask)
    square = np.ones((3, 3), bool)
    inner = scipy.ndimage.binary_erosion(mask, square, border_value=1)
    outer = scipy.ndimage.binary_dilation(mask, square)
    drawn = fill_parts(parts, SIZE)
    assert not (inner & ~drawn).any()
    assert not (drawn & ~outer).any()
    exact = polygons.mask_parts(mask, tolerance=0.0)
    assert len(parts) == len(exact)
    if name in ("ring", "blobs", "slanted"):
        corners = sum(len(part.outer) for part in parts)
        assert corners < 0.5 * sum(len(part.outer) for part in exact)
        assert (drawn & mask).sum() / (drawn | mask).sum() > 0.95


def test_a_slanted_edge_becomes_a_line_and_a_rectangle_four_corners():
    y, x = np.mgrid[:200, :300]
    (part,) = polygons.mask_parts((y > 20) & (y < 150) & (x > 30) & (x < 250))
    assert sorted(map(tuple, part.outer)) == [(31, 21), (31, 150), (250, 21), (250, 150)]
    (part,) = polygons.mask_parts((3 * x + 5 * y < 600) & (x > 10) & (y > 10))
    assert len(part.outer) <= 5
    assert polygons.mask_parts(np.zeros((5, 5), bool)) == []


def test_joined_rings_fill_the_same():
    mask = shapes()["island"]
    parts = polygons.mask_parts(mask, tolerance=0.0)
    ring = polygons.join([ring for part in parts for ring in (part.outer, *part.holes)])
    np.testing.assert_array_equal(fill(ring, SIZE), mask)
    # Another program, another rule for pixels on the line: a bridge may be drawn a pixel wide.
    image = Image.new("1", SIZE[::-1])
    rows, cols = skimage.draw.polygon(ring[:, 1] - 0.5, ring[:, 0] - 0.5, SIZE)
    drawn = np.array(image)
    drawn[rows, cols] = True
    assert (drawn != mask).sum() < 0.05 * mask.sum()


def make_annotations() -> list[dict]:
    masks = shapes()
    named = [("a/b: c?", "island", 0.91), ("猫", "slanted", 0.8), ("🐈", "ring", 0.515)]
    empty = annotation("猫", np.zeros(SIZE, bool), [0, 0, 0, 0], 0.5)
    return [annotation(p, masks[m], [1, 2, 30, 40], s) for p, m, s in named] + [empty]


def test_masks(tmp_path):
    found = make_annotations()
    (tmp_path / "x_masks").mkdir()
    (tmp_path / "x_masks" / "old.png").write_bytes(b"")
    folder = writers.write_masks(tmp_path, "x", found)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "000_a-b-c_0.91.png",
        "001_猫_0.80.png",
        "002_phrase_0.52.png",
        "003_猫_0.50.png",
    ]
    with Image.open(folder / names[0]) as image:
        assert image.mode == "1"
        np.testing.assert_array_equal(np.asarray(image), shapes()["island"])
    assert [path.name for path in tmp_path.iterdir()] == ["x_masks"]


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("../../etc/passwd", "etc-passwd"),
        ("  red\tcar\n", "red-car"),
        ("รถยนต์", "รถยนต์"),
        ("नमस्ते", "नमस्ते"),
        ("CON: nul", "CON-nul"),
        ("...", "phrase"),
        ("", "phrase"),
    ],
)
def test_phrases_in_file_names(phrase, expected):
    assert writers.file_part(phrase) == expected


def test_long_phrases_are_cut_between_letters():
    assert len(writers.file_part("猫" * 500).encode()) == 78
    assert len(writers.file_part("word " * 500)) <= writers.NAME_BYTES


def test_overlay_is_the_one_of_the_detections(tmp_path):
    masks = np.stack([shapes()["slanted"], shapes()["ring"]])
    image = np.ascontiguousarray(skimage.data.coffee()[: SIZE[0], : SIZE[1]])
    scores = np.asarray([0.9, 0.7], np.float32)
    found = [annotation("cup", m, [0, 0, 9, 9], s) for m, s in zip(masks, scores, strict=True)]
    path = writers.write_overlay(tmp_path, "x", image, found)
    assert path.name == "x_overlay.png"
    detections = Detections(masks, np.zeros((2, 4), np.float32), scores)
    with Image.open(path) as drawn:
        np.testing.assert_array_equal(drawn, visualize.overlay(image, detections, "cup"))
    writers.write_overlay(tmp_path, "x", image, found, show_phrases=False)
    with Image.open(path) as drawn:
        np.testing.assert_array_equal(drawn, visualize.overlay(image, detections))
    with Image.open(writers.write_overlay(tmp_path, "y", image, [])) as drawn:
        np.testing.assert_array_equal(drawn, image)


@pytest.mark.parametrize("size", [(700, 301), (20, 30), (1, 1)])
def test_probability_maps_have_no_seams(tmp_path, rng, size):
    logits = {"a cat": rng.normal(scale=3, size=(36, 36)).astype(np.float32)}
    folder = writers.write_semantic(tmp_path, "x", logits, size)
    with Image.open(folder / "000_a-cat.png") as image:
        assert image.mode == "L"
        drawn = np.asarray(image).astype(float)
    whole = Image.fromarray(logits["a cat"]).resize(size[::-1], Image.Resampling.BILINEAR)
    # In one piece Pillow's weights differ in the last bit: at most one step of 255.
    assert np.abs(drawn - 255 * sigmoid(np.asarray(whole))).max() <= 1


def test_labelme(tmp_path):
    found = make_annotations()
    photo = tmp_path / "photos" / "x.jpg"
    out = tmp_path / "out"
    out.mkdir()
    path = writers.write_labelme(out, "x", photo, SIZE, found)
    data = json.loads(path.read_text())
    assert data["imagePath"] == "../../photos/x.jpg"
    assert (data["imageHeight"], data["imageWidth"]) == SIZE
    assert [s["label"] for s in data["shapes"]] == ["a/b: c?", "a/b: c?", "猫", "🐈"]
    assert [s["group_id"] for s in data["shapes"]] == [0, 0, None, None]
    assert {s["shape_type"] for s in data["shapes"]} == {"polygon"}
    ring = fill(np.asarray(data["shapes"][3]["points"]), SIZE)
    mask = shapes()["ring"]
    assert (ring & mask).sum() / (ring | mask).sum() > 0.95


def test_yolo(tmp_path):
    classes = ["a/b: c?", "🐈", "猫", "two\nlines"]
    path = writers.write_yolo(tmp_path, "x", make_annotations(), classes)
    lines = [line.split() for line in path.read_text().splitlines()]
    assert [int(line[0]) for line in lines] == [0, 2, 1]  # the empty mask has none
    for line, name in zip(lines, ("island", "slanted", "ring"), strict=True):
        ring = np.asarray(line[1:], float).reshape(-1, 2)
        assert ring.min() >= 0
        assert ring.max() <= 1
        drawn, mask = fill(ring * SIZE[::-1], SIZE), shapes()[name]
        assert (drawn & mask).sum() / (drawn | mask).sum() > 0.93
    written = writers.write_classes(tmp_path, classes).read_text(encoding="utf-8")
    assert written.splitlines() == ["a/b: c?", "🐈", "猫", "two lines"]
    with pytest.raises(ValueError, match="'猫' is not among the classes"):
        writers.write_yolo(tmp_path, "y", make_annotations(), ["a/b: c?"])
    assert [p.name for p in path.parent.iterdir() if p.name.startswith((".", "y"))] == []


def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path, monkeypatch):
    def full(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    old = writers.write_yolo(tmp_path, "x", make_annotations()[:1], ["a/b: c?"])
    before = old.read_bytes()
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"No space left on device: .*x\.txt"):
        writers.write_yolo(tmp_path, "x", [], ["a/b: c?"])
    assert old.read_bytes() == before
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="x_masks"):
        writers.write_masks(tmp_path, "x", make_annotations())
    assert [path.name for path in tmp_path.iterdir()] == ["yolo"]


def test_masks_of_a_crowd_are_unpacked_one_at_a_time(tmp_path):
    """30 masks of 2 MB each: 58 MB at once."""
    size = (1200, 1600)
    found = []
    for i in range(30):
        mask = np.zeros(size, bool)
        mask[10 * i : 10 * i + 80, 15 * i : 15 * i + 100] = True
        found.append(annotation("cup", mask, [0, 0, 9, 9], 0.9))
    image = np.zeros((*size, 3), np.uint8)
    calls = (
        lambda: writers.write_overlay(tmp_path, "x", image, found),
        lambda: writers.write_labelme(tmp_path, "x", Path("x.jpg"), size, found),
        lambda: writers.write_yolo(tmp_path, "x", found, ["cup"]),
    )
    for call in calls:
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 30e6  # the picture twice at 6 MB, a mask and what is made of it


def test_masks_of_a_huge_picture_need_little_memory(tmp_path):
    """300 million pixels: unpacked, each mask would take 300 MB."""
    size = (15000, 20000)
    mask = np.hypot(*(np.mgrid[:400, :400] - 199.5)) < 190
    one = placed.Placed(mask, 9000, 16000, np.zeros(4, np.float32), 0.9)
    found = [placed.annotation("cup", one, size)]
    tracemalloc.start()
    (file,) = writers.write_masks(tmp_path, "x", found).iterdir()
    writers.write_labelme(tmp_path, "x", Path("x.jpg"), size, found)
    path = writers.write_yolo(tmp_path, "x", found, ["cup"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
    assert file.stat().st_size < 1e6
    corners = np.asarray(path.read_text().split()[1:], float).reshape(-1, 2) * size[::-1]
    np.testing.assert_allclose(corners.mean(0), [16200, 9200], atol=5)
    (shape,) = json.loads((tmp_path / "labelme" / "x.json").read_text())["shapes"]
    np.testing.assert_allclose(shape["points"], corners, atol=0.02)  # six digits of a fraction
