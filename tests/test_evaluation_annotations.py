"""Reading ground truth and predictions: every layout, and every kind of damage by its id."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from pycocotools import mask as coco_mask

from sam3_jax.data import masks
from sam3_jax.data.annotations import check_pictures, load_annotations
from sam3_jax.data.images import ImageError
from sam3_jax.data.masks import BrokenMaskError
from sam3_jax.data.pictures import load_as_annotated
from sam3_jax.data.records import AnnotationError
from sam3_jax.evaluation.predictions import load_predictions

SIZE = (20, 30)
SQUARE = [2, 3, 8, 3, 8, 9, 2, 9]  # 6 x 6 pixels at (2, 3)


def rle(mask: np.ndarray) -> dict[str, Any]:
    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


def block(x: int, y: int, w: int, h: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[y : y + h, x : x + w] = True
    return mask


def write(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data))
    return path


def image(number: int, **more: Any) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number}.jpg", "height": 20, "width": 30, **more}


@pytest.fixture
def coco() -> dict[str, Any]:
    """Two pictures, two categories; one has an instance of each kind of mask."""
    forms = [[SQUARE], rle(block(1, 2, 3, 4)), {"size": [20, 30], "counts": [0, 20, 580]}]
    annotations = [
        {"id": i, "image_id": 7, "category_id": 1, "bbox": [1, 1, 5, 5], "segmentation": form}
        for i, form in enumerate(forms)
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 5, "name": "dog"}]
    return {"images": [image(7), image(8)], "annotations": annotations, "categories": categories}


@pytest.fixture
def saco() -> dict[str, Any]:
    """Two pairs of one picture, boxes as fractions."""
    flags = {"file_name": "a/x.jpg", "is_instance_exhaustive": 1, "is_pixel_exhaustive": 1}
    images = [
        image(100, text_input=" red car ", **flags),
        image(101, text_input="bus", **flags),
    ]
    annotation = {"id": 1, "image_id": 100, "category_id": 1, "iscrowd": 0, "area": 0.06}
    annotation |= {"bbox": [0.1, 0.2, 0.2, 0.3], "segmentation": rle(block(3, 4, 6, 6))}
    categories = [{"id": 1, "name": "object"}]
    return {"images": images, "annotations": [annotation], "categories": categories}


def test_counts_are_parsed_as_pycocotools_does(rng):
    for _ in range(60):
        mask = rng.random((37, 300)) < rng.choice([0.001, 0.02, 0.5])
        counts = rle(mask)["counts"].encode()
        flat = mask.ravel(order="F")
        changes = np.flatnonzero(np.diff(np.concatenate([[False], flat])))
        runs = np.diff(np.concatenate([[0], changes, [flat.size]]))
        np.testing.assert_array_equal(masks.parse_counts(counts), runs)


def test_coco_pairs_images_with_categories(tmp_path, coco):
    file = write(tmp_path / "a.json", coco)
    dataset = load_annotations([file])
    assert [(r.key, r.phrase) for r in dataset.records] == [
        ((7, 1), "cat"),
        ((7, 5), "dog"),
        ((8, 1), "cat"),
        ((8, 5), "dog"),
    ]
    instances = dataset.records[0].answers[0].instances
    decoded = masks.decode([i.rle for i in instances], SIZE)
    np.testing.assert_array_equal(decoded[0], block(2, 3, 6, 6))
    np.testing.assert_array_equal(decoded[1], block(1, 2, 3, 4))
    np.testing.assert_array_equal(decoded[2], block(0, 0, 1, 20))
    assert instances[0].box == (1, 1, 5, 5)
    assert dataset.has_masks
    assert dataset.layout == "coco"
    assert [r.key for r in load_annotations([file], negatives=False).records] == [(7, 1)]


def test_roboflow_folder_without_its_project_category(tmp_path, coco):
    for category in coco["categories"]:
        category["supercategory"] = "pets-abc"
    coco["categories"].insert(0, {"id": 0, "name": "pets-abc", "supercategory": "none"})
    for annotation in coco["annotations"]:
        annotation["segmentation"] = []
    (tmp_path / "valid").mkdir()
    write(tmp_path / "valid" / "_annotations.coco.json", coco)
    dataset = load_annotations([tmp_path / "valid"])
    assert {record.phrase for record in dataset.records} == {"cat", "dog"}
    assert not dataset.has_masks
    with pytest.raises(AnnotationError, match="name one of its splits: valid"):
        load_annotations([tmp_path])


def test_saco_has_phrases_flags_and_boxes_as_fractions(tmp_path, saco):
    saco["images"][1]["is_instance_exhaustive"] = 0
    dataset = load_annotations([write(tmp_path / "a.json", saco)])
    car, bus = dataset.records
    assert (car.phrase, car.file_name, car.exhaustive) == ("red car", "a/x.jpg", True)
    assert not bus.exhaustive
    (instance,) = car.answers[0].instances
    assert instance.box == pytest.approx((3, 4, 6, 6))
    assert instance.area == 36
    assert bus.answers[0].instances == ()


def test_several_annotators(tmp_path, saco, coco):
    other = copy.deepcopy(saco)
    other["annotations"] = []
    other["images"][1]["is_instance_exhaustive"] = 0
    files = [write(tmp_path / "a.json", saco), write(tmp_path / "b.json", other)]
    car, bus = load_annotations(files).records
    assert [len(answer.instances) for answer in car.answers] == [1, 0]
    assert not bus.exhaustive  # all annotators must have found everything
    del other["images"][1]
    other["images"][0]["text_input"] = "car"
    write(files[1], other)
    with pytest.raises(AnnotationError, match=r"pair missing in b\.json: 1 \(image 101\)"):
        load_annotations(files)
    with pytest.raises(AnnotationError, match="there is no usable image-phrase pair"):
        load_annotations(files, max_bad=1.0)
    with pytest.raises(AnnotationError, match="several files are the answers"):
        load_annotations([files[0], write(tmp_path / "c.json", coco)])


DAMAGE = {
    "broken run-length encoding": {"segmentation": {"size": [20, 30], "counts": "zz~"}},
    "mask of another size than the image": {"segmentation": {"size": [9, 9], "counts": [81]}},
    "polygon of fewer than three points": {"segmentation": [[1, 1, 5, 5]]},
    "polygon is not a list of x, y, x, y, ...": {"segmentation": [[1, 1, 5, 5, 2, 2, 9]]},
    "polygon is not a list of numbers": {"segmentation": [["a", 1, 2, 3, 4, 5]]},
    "polygon far outside the image": {"segmentation": [[0, 0, 1e12, 0, 1e12, 1e12]]},
    "mask of zero area": {"segmentation": {"size": [20, 30], "counts": [600]}},
    "no mask, while others have one": {"segmentation": []},
    "box of zero area": {"bbox": [3, 3, 0, 5]},
    "box outside the image": {"bbox": [300, 3, 5, 5]},
    "unknown category": {"category_id": 99},
    "unknown image": {"image_id": 99},
    "duplicate annotation id": {"id": 0},
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_bad_annotation_is_named_and_its_pair_is_no_longer_exhaustive(tmp_path, coco, kind):
    bad = {**coco["annotations"][0], "id": 77, "image_id": 8, **DAMAGE[kind]}
    coco["annotations"].append(bad)
    dataset = load_annotations([write(tmp_path / "a.json", coco)], max_bad=0.2)
    assert dataset.problems.found == {kind: [f"annotation {bad['id']}"]}
    assert len(dataset.records[0].answers[0].instances) == 3
    lost = [record.key for record in dataset.records if not record.exhaustive]
    assert lost == ([] if kind.startswith("unknown") else [(8, 1)])


def test_bad_images_and_categories(tmp_path, coco, saco):
    coco["images"] += [image(7), {"id": 9, "file_name": "x.jpg"}, image(10, file_name=""), "?"]
    coco["categories"] += [{"id": 6, "name": " "}, {"id": 5, "name": "cow"}]
    coco["annotations"] += [17]
    problems = load_annotations([write(tmp_path / "a.json", coco)], max_bad=1.0).problems
    assert problems.found == {
        "duplicate image id": ["image 7"],
        "image without height and width": ["image 9"],
        "image without file_name": ["image 10"],
        "image without id": ["image number 5"],
        "empty phrase": ["category 6"],
        "duplicate category id": ["category 5"],
        "annotation without id": ["annotation number 3"],
    }
    saco["images"][1]["text_input"] = "  "
    dataset = load_annotations([write(tmp_path / "b.json", saco)], max_bad=1.0)
    assert dataset.problems.lines() == ["empty phrase: 1 (image 101)"]


def test_too_much_damage_stops(tmp_path, coco):
    coco["annotations"][0]["category_id"] = 99
    file = write(tmp_path / "a.json", coco)
    with pytest.raises(AnnotationError, match=r"a\.json: 1 of 5 .* more than the 10\.0% allowed"):
        load_annotations([file])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "no lists named images and annotations"),
        ('{"images": [], "annotations": []}', "no list named categories"),
    ],
)
def test_files_that_are_no_annotations(tmp_path, text, message):
    file = tmp_path / "a.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(AnnotationError, match=message) as error:
        load_annotations([file])
    assert str(file) in str(error.value)


def test_missing_pictures(tmp_path, coco):
    dataset = load_annotations([write(tmp_path / "a.json", coco)])
    (tmp_path / "7.jpg").write_bytes(b"")
    check_pictures(dataset, tmp_path, 0.5)
    with pytest.raises(AnnotationError, match=r"1 of 2 .*\n.*folder right\?: 1 \(8\.jpg\)"):
        check_pictures(dataset, tmp_path)


def test_the_orientation_of_the_annotations_counts(tmp_path, rng):
    stored = rng.integers(0, 255, (20, 40, 3), np.uint8)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    PIL.Image.fromarray(stored).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(load_as_annotated(tmp_path / "x.png", (20, 40)), stored)
    turned = load_as_annotated(tmp_path / "x.png", (40, 20))
    np.testing.assert_array_equal(turned, np.rot90(stored, -1))
    with pytest.raises(ImageError, match="is 40 x 20 pixels, its annotations are for 30 x 30"):
        load_as_annotated(tmp_path / "x.png", (30, 30))


def test_predictions_as_a_list(tmp_path, coco, saco):
    dataset = load_annotations([write(tmp_path / "a.json", coco)])
    found = [
        {"image_id": 7, "category_id": 5, "score": 0.4, "segmentation": rle(block(1, 1, 4, 4))},
        {"image_id": 7, "category_id": 5, "score": 0.6, "segmentation": rle(block(0, 0, 0, 0))},
    ]
    file = write(tmp_path / "p.json", found)
    predictions = load_predictions(file, dataset)
    first, empty = predictions.found[7, 5]
    assert (first.box, first.score) == ((1, 1, 4, 4), 0.4)
    assert empty.area == 0  # a wrong prediction is still one
    assert predictions.has_masks

    # SA-Co: one category whatever it is called; boxes as fractions.
    dataset = load_annotations([write(tmp_path / "b.json", saco)])
    box = {"image_id": 100, "category_id": 3, "score": 0.4, "bbox": [0.5, 0.5, 0.5, 0.6]}
    predictions = load_predictions(write(tmp_path / "q.json", [box]), dataset)
    assert predictions.found[(100,)][0].box == pytest.approx((15, 10, 15, 12))
    assert not predictions.has_masks


def test_predictions_by_file_name_and_phrase(tmp_path, saco):
    dataset = load_annotations([write(tmp_path / "a.json", saco)])
    data = {
        "images": [{"id": 1, "file_name": "photos/a/x.jpg", "status": "ok"}],
        "categories": [{"id": 1, "name": "bus"}, {"id": 2, "name": "tram"}],
        "annotations": [
            {"image_id": 1, "category_id": 1, "score": 0.9, "segmentation": rle(block(1, 1, 4, 4))},
            {"image_id": 1, "category_id": 2, "score": 0.9, "segmentation": rle(block(1, 1, 4, 4))},
        ],
    }
    predictions = load_predictions(write(tmp_path / "p.json", data), dataset)
    assert set(predictions.found) == {(101,)}
    assert "1 of 2 pairs are not in the predictions" in predictions.notes[0]
    assert predictions.notes[1].startswith("1 predictions of pairs outside")
    data["images"][0].update(status="error", error="truncated")
    predictions = load_predictions(write(tmp_path / "p.json", data), dataset)
    assert predictions.failed == {"a/x.jpg": "truncated"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("text", "is neither a list of COCO results nor"),
        ([{"image_id": 7, "category_id": 1, "bbox": [1, 1, 2, 2]}], "is this a ground truth"),
        (
            [{"image_id": 3, "category_id": 1, "bbox": [1, 1, 2, 2], "score": 1}],
            "none of its 1 predictions belongs",
        ),
        (
            [
                {
                    "image_id": 7,
                    "category_id": 1,
                    "score": 1,
                    "segmentation": {"size": [20, 30], "counts": "0"},
                }
            ],
            "broken run-length encoding: 1",
        ),
        ([{"image_id": 7, "category_id": 1, "score": "x", "bbox": [1, 1, 2, 2]}], "not a number"),
    ],
)
def test_files_that_are_no_predictions(tmp_path, coco, data, message):
    dataset = load_annotations([write(tmp_path / "a.json", coco)])
    with pytest.raises(AnnotationError, match=message) as error:
        load_predictions(write(tmp_path / "p.json", data), dataset)
    assert "p.json" in str(error.value)


def test_damaged_counts_never_reach_pycocotools():
    good = rle(block(3, 3, 10, 10))["counts"]
    for counts in ("", good[:-1], good + "5", good[1:], "\x7f" + good, "o" * 30 + "0"):
        with pytest.raises(BrokenMaskError, match="broken run-length encoding"):
            masks.to_rle({"size": list(SIZE), "counts": counts}, SIZE)
