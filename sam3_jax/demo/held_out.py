"""The demo's held-out sets: pictures and an SA-Co annotation file, as evaluate.py reads them.

They were fixed before the first training run and are never made easier: ``DIGESTS`` are those of
the annotation files, and a test compares them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sam3_jax.data.scenes import Scene
from sam3_jax.demo.builder import make_scenes
from sam3_jax.demo.layout import SceneConfig

FILE = "annotations.json"
COUNTS = {"valid": 100, "test": 300, "unseen": 150}
DIGESTS = {
    "valid": "787ad584318c78332a73f6e456052015e4457e980fe6ff7a143329b894d869c5",
    "test": "d3c340763a810a5d87b55166cbe454d708a9bddc342bb236996e125f6e872c35",
    "unseen": "0937834ee3038740a67db658aa2fb1968b674bdf3bd41dbeac70f9a58e096501",
}


def write_split(folder: Path, split: str, count: int = 0) -> Path:
    """Writes a held-out set, or finds it already written; returns the annotation file.

    The file is written last, so that its presence says that the pictures are there.

    Args:
      folder: to write to, pictures and annotations.
      split: of ``COUNTS``.
      count: only the first pictures; 0: all, which are then compared with ``DIGESTS``.
    """
    config, count = SceneConfig(), count or COUNTS[split]
    file = folder / FILE
    if file.is_file() and json.loads(file.read_text())["info"] == _info(config, split, count):
        return file
    folder.mkdir(parents=True, exist_ok=True)
    scenes = []
    for scene in make_scenes(config, split, count):
        (folder / scene.picture.file_name).write_bytes(scene.data)
        scenes.append(scene._replace(data=b""))
    text = annotations_of(scenes, config, split)
    file.write_text(text, encoding="utf-8")
    if count == COUNTS[split] and digest_of(text) != DIGESTS[split]:
        print(
            f"warning: {file}: differs from the published set ({digest_of(text)} instead of "
            f"{DIGESTS[split]}); figures on it cannot be compared with published ones",
            file=sys.stderr,
        )
    return file


def annotations_of(scenes: Sequence[Scene], config: SceneConfig, split: str) -> str:
    """The text of an SA-Co file; boxes are fractions of the picture."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for scene in scenes:
        height, width = scene.picture.size
        for pair in scene.pairs:
            images.append(
                {
                    "id": int(pair.pair_id),
                    "file_name": scene.picture.file_name,
                    "height": height,
                    "width": width,
                    "text_input": pair.phrase,
                    "is_instance_exhaustive": int(pair.exhaustive),
                    "is_pixel_exhaustive": int(pair.pixel_exhaustive),
                }
            )
            for instance in pair.instances:
                x, y, w, h = instance.box
                annotations.append(
                    {
                        "id": instance.id,
                        "image_id": int(pair.pair_id),
                        "category_id": 1,
                        "bbox": [x / width, y / height, w / width, h / height],
                        "area": instance.area,
                        "iscrowd": 0,
                        "segmentation": {
                            "size": [height, width],
                            "counts": instance.rle["counts"].decode("ascii"),
                        },
                    }
                )
    content = {
        "info": _info(config, split, len(scenes)),
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "object"}],
    }
    return json.dumps(content, separators=(",", ":")) + "\n"


def digest_of(text: str) -> str:
    """SHA-256 of an annotation file."""
    return hashlib.sha256(text.encode()).hexdigest()


def _info(config: SceneConfig, split: str, count: int) -> dict[str, Any]:
    scene = dataclasses.asdict(config)
    del scene["view"], scene["words"]  # of close-ups alone, which came after the sets were fixed
    return {"description": "sam3_jax demo", "split": split, "pictures": count, "scene": scene}
