"""Small real pictures with annotation files, for the tests of reading and training data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from skimage import data

PICTURES = {"face.png": data.astronaut, "cup.jpg": data.coffee, "cat.png": data.chelsea}
SIZES = {"face.png": (96, 96), "cup.jpg": (80, 120), "cat.png": (90, 136)}  # height, width
CATEGORIES = {1: ("face", "person"), 2: ("Cup", "dish"), 3: ("saucer", "dish"), 4: ("cat", "pet")}
CATEGORIES |= {5: ("dog", "pet"), 6: ("red car", "vehicle"), 7: ("coffee cup", "drink")}


def ellipse(size: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    """A mask that fills the box (x, y, width, height) to its edges."""
    x, y, w, h = box
    rows, columns = np.ogrid[: size[0], : size[1]]
    return ((columns - x + 0.5 - w / 2) / (w / 2)) ** 2 + (
        (rows - y + 0.5 - h / 2) / (h / 2)
    ) ** 2 <= 1


def rle(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run lengths."""
    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(n) for n in encoded["size"]], "counts": encoded["counts"].decode()}


def write_pictures(folder: Path) -> None:
    """Writes all of ``PICTURES``."""
    for name, load in PICTURES.items():
        Image.fromarray(load()).resize(SIZES[name][::-1]).save(folder / name)


def coco(**more: Any) -> dict[str, Any]:
    """Images 10, 11, 12 with a face; a cup, a saucer and a crowd of cups; two cats."""
    images = [
        {"id": 10 + i, "file_name": name, "height": SIZES[name][0], "width": SIZES[name][1]}
        for i, name in enumerate(PICTURES)
    ]
    rows = [
        (10, 1, (26, 6, 30, 36), 0),
        (11, 2, (30, 16, 50, 40), 0),
        (11, 2, (90, 50, 20, 20), 1),
        (11, 3, (20, 10, 70, 60), 0),
        (12, 4, (20, 10, 60, 70), 0),
        (12, 4, (100, 40, 30, 40), 0),
    ]
    annotations = []
    for number, (image, category, box, crowd) in enumerate(rows):
        size = (images[image - 10]["height"], images[image - 10]["width"])
        annotations.append(
            {
                "id": 100 + number,
                "image_id": image,
                "category_id": category,
                "bbox": list(box),
                "iscrowd": crowd,
                "segmentation": rle(ellipse(size, box)),
            }
        )
    categories = [{"id": i, "name": n, "supercategory": g} for i, (n, g) in CATEGORIES.items()]
    return {"images": images, "annotations": annotations, "categories": categories, **more}


def saco() -> dict[str, Any]:
    """Three pairs of the cat picture, one of the cup; boxes as fractions."""
    cat = {"file_name": "cat.png", "height": 90, "width": 136}
    cup = {"file_name": "cup.jpg", "height": 80, "width": 120}
    images = [
        {"id": 1, "text_input": "striped cat", "is_instance_exhaustive": 1, **cat},
        {"id": 2, "text_input": "cup", "is_instance_exhaustive": 1, **cup},
        {"id": 3, "text_input": "dog", "is_instance_exhaustive": 1, **cat},
        {"id": 4, "text_input": "whisker", "is_instance_exhaustive": 0, **cat},
    ]
    boxes = {1: (20, 10, 60, 70), 2: (30, 16, 50, 40)}
    annotations = []
    for number, (x, y, w, h) in boxes.items():
        height, width = images[number - 1]["height"], images[number - 1]["width"]
        annotations.append(
            {
                "id": number,
                "image_id": number,
                "category_id": 1,
                "bbox": [x / width, y / height, w / width, h / height],
                "segmentation": rle(ellipse((height, width), (x, y, w, h))),
            }
        )
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}


def write_json(path: Path, content: Any) -> Path:
    """Writes a file and returns its path."""
    path.write_text(json.dumps(content))
    return path
