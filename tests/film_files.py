"""Small videos with masklets on disk, in the layouts that the tracker trains on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import data_sets
import video_clips

SIZE, FRAMES = (48, 64), 6


def picture(index: int) -> np.ndarray:
    """A red block that moves to the right, a blue one that stays until frame 3."""
    image = np.full((*SIZE, 3), 90, np.uint8)
    for mask, color in zip(truth(index), ((220, 30, 30), (30, 30, 220)), strict=True):
        if mask is not None:
            image[mask] = color
    return image


def truth(index: int) -> tuple[np.ndarray, np.ndarray | None]:
    moving, still = np.zeros(SIZE, bool), np.zeros(SIZE, bool)
    moving[10:26, 4 + 6 * index : 20 + 6 * index] = True
    still[30:44, 40:60] = True
    return moving, still if index < 3 else None


def rles(number: int, count: int = FRAMES) -> list[dict[str, Any] | None]:
    masks = [truth(i)[number] for i in range(count)]
    return [None if mask is None else data_sets.rle(mask) for mask in masks]


def write_ytvis(folder: Path, *, videos: int = 2) -> Path:
    """Frames and ``instances.json``; every video shows the same."""
    content: dict[str, Any] = {"videos": [], "annotations": [], "categories": []}
    for number in range(1, videos + 1):
        names = [f"v{number}/{i:05d}.jpg" for i in range(FRAMES)]
        (folder / "JPEGImages" / f"v{number}").mkdir(parents=True)
        for i, name in enumerate(names):
            Image.fromarray(picture(i)).save(folder / "JPEGImages" / name, quality=95)
        size = {"height": SIZE[0], "width": SIZE[1], "length": FRAMES}
        content["videos"].append({"id": number, "file_names": names, **size})
        for which in range(2):
            entry = {"id": 10 * number + which, "video_id": number, "category_id": 1}
            content["annotations"].append({**entry, "segmentations": rles(which)})
    return data_sets.write_json(folder / "instances.json", content)


def write_sav(folder: Path, *, masklets: list[list[Any]] | None = None) -> Path:
    """A video of 24 frames whose every fourth is annotated, and its manual masklets."""
    folder.mkdir(parents=True, exist_ok=True)
    size = video_clips.SIZE
    video_clips.write_clip(folder / "sav_000001.mp4", 24)
    mask = np.zeros(size, bool)
    mask[10:30, 20:50] = True
    rows = masklets or [[data_sets.rle(mask)] for _ in range(6)]
    content = {"video_height": size[0], "video_width": size[1], "video_frame_count": 24}
    path = folder / "sav_000001_manual.json"
    path.write_text(json.dumps({**content, "video_id": "sav_000001", "masklet": rows}))
    return folder
