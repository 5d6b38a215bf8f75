"""Made-up videos for the tests of video metrics: tracks, files, and a case with every trouble."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from sam3_jax.evaluation.video.records import Track
from test_cgf1 import Chance

SIZE = (40, 50)
PHRASES = ("cat", "dog", "cup", "unseen", "hat")


def encode(mask: np.ndarray | None) -> dict[str, Any] | None:
    """As files have it."""
    if mask is None:
        return None
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def strip(start: int, pixels: int, width: int = 20) -> np.ndarray:
    """A mask of ``pixels`` pixels in a row: with others of one row any IoU can be worked out."""
    mask = np.zeros((1, width), bool)
    mask[0, start : start + pixels] = True
    return mask


def track(*masks: np.ndarray | None, number: int = 0, score: float = 0.9) -> Track:
    """A track in memory."""
    rles = (None if m is None else coco_mask.encode(np.asfortranarray(m, np.uint8)) for m in masks)
    return Track(number, tuple(rles), score)


def result(video: int, category: int, masks: list[np.ndarray | None], score: float) -> dict:
    """A track in a file of predictions, with what upstream wants beside the masks."""
    areas = [0 if mask is None else int(mask.sum()) for mask in masks]
    boxes = [
        None if not area else coco_mask.toBbox(encode(mask)).tolist()
        for mask, area in zip(masks, areas, strict=True)
    ]
    return {
        "video_id": video,
        "category_id": category,
        "segmentations": [
            encode(mask) if area else None for mask, area in zip(masks, areas, strict=True)
        ],
        "bboxes": boxes,
        "areas": [area or None for area in areas],
        "score": score,
    }


def annotation(number: int, video: int, category: int, masks: list[np.ndarray | None]) -> dict:
    """A track in a file of annotations."""
    entry = result(video, category, masks, 1.0)
    del entry["score"]
    height, width = next(mask.shape for mask in masks if mask is not None)
    return entry | {"id": number, "iscrowd": 0, "height": height, "width": width}


def random_videos(seed: int = 8) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """SA-Co VEval annotations, and results with wrong names, switches, fragments and ghosts."""
    chance = Chance(seed)
    data: dict[str, Any] = {
        "videos": [],
        "annotations": [],
        "categories": [{"id": 10 * n, "name": name} for n, name in enumerate(PHRASES, start=1)],
        "video_np_pairs": [],
    }
    results = []
    for video, category in itertools.product(range(1, 11), (10, 20, 30, 40, 50)):
        pair = len(data["video_np_pairs"]) + 1
        entry = {"id": pair, "video_id": video, "category_id": category}
        data["video_np_pairs"].append(entry)
    for video in range(1, 11):
        length = 5 + chance.below(4)
        names = [f"video_{video}/{t:05d}.jpg" for t in range(length)]
        size = {"height": SIZE[0], "width": SIZE[1], "length": length}
        data["videos"].append({"id": video, "file_names": names, **size})
        if video == 5:
            results.append(result(video, 20, _ellipses(chance, length), 0.8))
            continue  # nothing is in it
        there = []
        for _ in range(2 + chance.below(4)):
            category = (10, 20, 30, 50)[chance.below(4)]
            masks = _ellipses(chance, length)
            there.append((category, masks))
            number = len(data["annotations"]) + 1
            data["annotations"].append(annotation(number, video, category, masks))
        if video != 6:  # nothing is predicted there
            results += _guesses(chance, video, there)
    return data, results


def _ellipses(chance: Chance, length: int) -> list[np.ndarray | None]:
    """An ellipse that wanders, and is out of sight in some frames."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    cy, cx = 8 + chance.below(SIZE[0] - 16), 8 + chance.below(SIZE[1] - 16)
    ry, rx = 6 + chance.below(5), 6 + chance.below(5)
    masks: list[np.ndarray | None] = []
    for t in range(length):
        cy, cx = cy + chance.below(3) - 1, cx + chance.below(3) - 1
        visible = t == 1 or chance.below(6)
        inside = ((y - cy) * rx) ** 2 + ((x - cx) * ry) ** 2 < (rx * ry) ** 2
        masks.append(inside if visible else None)
    return masks


def _guesses(chance: Chance, video: int, there: list[tuple[int, list]]) -> list[dict]:
    found = []
    for category, masks in there:
        near = [
            None
            if mask is None or not chance.below(8)
            else np.roll(mask, (chance.below(3) - 1, chance.below(3) - 1), (0, 1))
            for mask in masks
        ]
        name = category if chance.below(4) else (10, 20, 30, 40)[chance.below(4)]
        score = (0.9, 0.7, 0.51, 0.3)[chance.below(4)]
        cut = chance.below(2 * len(masks))
        if 1 < cut < len(masks) - 1:  # two fragments
            rest = [None] * len(masks)
            found.append(result(video, name, near[:cut] + rest[cut:], score))
            near = rest[:cut] + near[cut:]
        found.append(result(video, name, near, score))
    if len(found) > 1 and chance.below(2):  # two tracks change places
        a, b = found[-2:]
        for field in ("segmentations", "bboxes", "areas"):
            a[field][3:], b[field][3:] = b[field][3:], a[field][3:]
    if chance.below(2):
        found.append(result(video, 20, _ellipses(chance, len(there[0][1])), 0.6))
    return found


def write(folder: Path, data: Any, results: Any) -> tuple[Path, Path]:
    """Both files."""
    paths = folder / "gt.json", folder / "results.json"
    for path, content in zip(paths, (data, results), strict=True):
        path.write_text(json.dumps(content))
    return paths
