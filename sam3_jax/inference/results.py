"""One results file for a whole run: COCO JSON with run-length encoded masks.

``results.json`` has the form of a COCO *dataset*, so ``pycocotools.coco.COCO("results.json")``,
viewers and annotation tools open it as it is. Its ``annotations`` are at the same time COCO
*predictions*: every one has a ``score``, and against a ground truth they are loaded by
``truth.loadRes(json.load(open("results.json"))["annotations"])``. Beyond COCO, every image has a
``status`` ("ok" or "error", then with ``error``) and the file has a ``schema_version``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from pycocotools import mask as coco_mask

from sam3_jax.inference.postprocess import Detections

SCHEMA_VERSION = 1


def encode_mask(mask: Bool[np.ndarray, "h w"]) -> dict[str, Any]:
    """A mask as COCO's compressed run lengths: ``{"size": [h, w], "counts": text}``."""
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode("ascii")}


class CocoResults:
    """Collects the instances of a run; every phrase is a category, ids count from 1.

    Args:
      phrases: names of the categories, each one once.
      info: anything about the run that belongs into the file (checkpoint, threshold, ...).
    """

    def __init__(self, phrases: Sequence[str], info: dict[str, Any]):
        self._data: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "info": dict(info),
            "images": [],
            "categories": [{"id": i, "name": name} for i, name in enumerate(phrases, start=1)],
            "annotations": [],
        }
        self._category = {name: i for i, name in enumerate(phrases, start=1)}

    def add_image(
        self,
        file_name: str,
        size: tuple[int, int],
        found: dict[str, Detections],
        overlay: str,
    ) -> None:
        """Adds an image that was processed.

        Args:
          file_name: as the user named it.
          size: (height, width) in pixels.
          found: the instances of every phrase.
          overlay: file name of the picture with the masks drawn in.
        """
        height, width = size
        image = {"file_name": file_name, "width": width, "height": height, "status": "ok"}
        image_id = self._append("images", {**image, "overlay": overlay})
        limits = np.asarray([width, height, width, height])
        for phrase, instances in found.items():
            for mask, box, score in zip(*instances, strict=True):
                x0, y0, x1, y1 = np.clip(box, 0, limits).tolist()
                annotation = {
                    "image_id": image_id,
                    "category_id": self._category[phrase],
                    "segmentation": encode_mask(mask),
                    "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "score": round(float(score), 6),
                }
                self._append("annotations", annotation)

    def add_error(self, file_name: str, error: str) -> None:
        """Adds an image that could not be processed, with the reason."""
        image = {"file_name": file_name, "width": None, "height": None}
        self._append("images", {**image, "status": "error", "error": error})

    def write(self, path: Path) -> None:
        """Writes the file; a file of that name is replaced at once or not at all.

        Raises:
          OSError: when the folder cannot be written to; nothing half-written stays.
        """
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(self._data) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _append(self, kind: str, item: dict[str, Any]) -> int:
        item_id = len(self._data[kind]) + 1
        self._data[kind].append({"id": item_id, **item})
        return item_id
