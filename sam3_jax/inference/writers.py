"""Files for one picture beside its record: pictures of the masks, and formats of other programs.

All are made of what the record holds (``annotations``, with run-length encoded masks that are
unpacked one at a time, around the object only), so memory grows neither with the number of
instances nor, beside the picture itself, with its size, and they can be made later from a results
file too. Every file is replaced at once or not at all. In the output folder:

- ``NAME_overlay.png``: the picture with the instances drawn in.
- ``NAME_masks/000_cat_0.91.png``: for each annotation, in its order, its mask as a bilevel PNG
  (black and white) of the picture's size.
- ``NAME_semantic/000_cat.png``: for each phrase how probable it is at every pixel, 0..255.
- ``labelme/NAME.json``: polygons for LabelMe. An instance in several pieces has a shape for each,
  with a common ``group_id``; a hole is joined to the outline around it by a bridge without area.
- ``yolo/NAME.txt``: for YOLO segmentation, one line an instance: class index, then x and y of the
  corners as fractions of the size. Pieces and holes are joined by bridges, so the number of lines
  is the number of instances. ``yolo/classes.txt`` has the names, line by line. (Trainers look for
  the text file under the picture's stem: NAME is another where two pictures share one.)
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from pycocotools import mask as coco_mask

from sam3_jax.inference.files import OVERLAY_SUFFIX, replacing, replacing_folder
from sam3_jax.inference.png import strip_height, strips_of, write_png
from sam3_jax.inference.polygons import Part, join, mask_parts
from sam3_jax.inference.postprocess import sigmoid
from sam3_jax.inference.rle import decode_crop
from sam3_jax.inference.visualize import Rect, draw

LABELME_VERSION = "5.5.0"  # the version whose files these are like
ROWS_AT_A_TIME = 256  # of a probability map in float
NAME_BYTES = 80  # of a phrase in a file name

Annotations = Sequence[Mapping[str, Any]]  # of a record


def file_part(phrase: str) -> str:
    """A phrase as a part of a file name: letters and digits of any script, the rest is ``-``.

    At most ``NAME_BYTES`` long; "phrase" where nothing is left (emoji).
    """
    # Marks (M) are parts of letters: Hindi and Thai words would fall apart without them.
    kept = (c if unicodedata.category(c)[0] in "LNM" else " " for c in phrase)
    name = "-".join("".join(kept).split())
    name = name.encode("utf-8")[:NAME_BYTES].decode("utf-8", "ignore")
    return name.strip("-") or "phrase"


def write_overlay(
    folder: Path,
    name: str,
    image: UInt8[np.ndarray, "h w 3"],
    annotations: Annotations,
    *,
    show_phrases: bool = True,
) -> Path:
    """The picture with its instances and their scores, and phrases if ``show_phrases``."""
    scores = np.asarray([a["score"] for a in annotations], np.float32)
    texts = [f"{a['phrase'] if show_phrases else ''} {a['score']:.2f}".strip() for a in annotations]
    drawn = draw(
        image,
        lambda i: decode_crop(annotations[i]["segmentation"])[0],
        [_extent(a["segmentation"]) for a in annotations],
        np.asarray([a["area"] for a in annotations], np.int64),
        scores,
        texts,
    )
    path = folder / f"{name}{OVERLAY_SUFFIX}"
    with replacing(path) as temporary:
        write_png(temporary, drawn.shape[:2], strips_of(drawn))
    return path


def _extent(segmentation: Mapping[str, Any]) -> Rect | None:
    """The rectangle around a mask, without unpacking it."""
    x, y, width, height = map(int, coco_mask.toBbox(segmentation))
    return Rect(x, y, x + width, y + height) if width and height else None


def write_masks(folder: Path, name: str, annotations: Annotations) -> Path:
    """A folder with a bilevel PNG for each instance."""
    path = folder / f"{name}_masks"
    with replacing_folder(path) as temporary:
        for i, item in enumerate(annotations):
            file = temporary / f"{i:03d}_{file_part(item['phrase'])}_{item['score']:.2f}.png"
            segmentation = item["segmentation"]
            write_png(file, tuple(segmentation["size"]), _mask_strips(segmentation))
    return path


def _mask_strips(segmentation: Mapping[str, Any]) -> Iterator[Bool[np.ndarray, "_ w"]]:
    """A mask in strips: the whole of it may be large."""
    height, width = segmentation["size"]
    crop, y, x = decode_crop(segmentation)
    rows = strip_height(width)
    for top in range(0, height, rows):
        strip = np.zeros((min(rows, height - top), width), bool)
        first, last = max(top, y), min(top + len(strip), y + crop.shape[0])
        if first < last:
            strip[first - top : last - top, x : x + crop.shape[1]] = crop[first - y : last - y]
        yield strip


def write_semantic(
    folder: Path,
    name: str,
    maps: Mapping[str, Float[np.ndarray, "_ _"]],
    size: tuple[int, int],
) -> Path:
    """A folder with an 8-bit PNG for each phrase: its probability, 0..255, at every pixel.

    Args:
      maps: logits of every phrase at any resolution.
      size: (height, width) of the picture.
    """
    path = folder / f"{name}_semantic"
    with replacing_folder(path) as temporary:
        for i, (phrase, logits) in enumerate(maps.items()):
            file = temporary / f"{i:03d}_{file_part(phrase)}.png"
            write_png(file, size, _probability(logits, size))
    return path


def _probability(
    logits: Float[np.ndarray, "mh mw"], size: tuple[int, int]
) -> Iterator[UInt8[np.ndarray, "_ w"]]:
    """Logits resized bilinearly to ``size``, as probabilities 0..255, a few rows at a time."""
    height, width = size
    source = Image.fromarray(np.asarray(logits, np.float32))
    scale = source.height / height
    for start in range(0, height, ROWS_AT_A_TIME):
        stop = min(start + ROWS_AT_A_TIME, height)
        # Beyond the box Pillow still reads its neighbours, so the pieces fit without seams.
        box = (0, start * scale, source.width, min(stop * scale, source.height))
        piece = source.resize((width, stop - start), Image.Resampling.BILINEAR, box)
        yield np.rint(255 * sigmoid(np.asarray(piece))).astype(np.uint8)


def write_labelme(
    folder: Path, name: str, image: Path, size: tuple[int, int], annotations: Annotations
) -> Path:
    """Polygons for LabelMe, with the scores; ``size`` is (height, width) of the picture ``image``.

    The file refers to the picture by a relative path and does not contain it.
    """
    path = folder / "labelme" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    shapes = []
    for i, item in enumerate(annotations):
        parts = _outlines(item["segmentation"])
        for part in parts:
            shape = {
                "label": item["phrase"],
                "points": join([part.outer, *part.holes]).tolist(),
                "group_id": i if len(parts) > 1 else None,
                "description": "",
                "shape_type": "polygon",
                "flags": {},
                "score": item["score"],
            }
            shapes.append(shape)
    content = {
        "version": LABELME_VERSION,
        "flags": {},
        "shapes": shapes,
        "imagePath": _relative(image, path.parent),
        "imageData": None,
        "imageHeight": size[0],
        "imageWidth": size[1],
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    return path


def _outlines(segmentation: Mapping[str, Any]) -> list[Part]:
    mask, y, x = decode_crop(segmentation)
    return mask_parts(mask, corner=(x, y))


def _relative(path: Path, folder: Path) -> str:
    """``path`` as seen from ``folder``; absolute where there is no way (drives of Windows)."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:
        return path.absolute().as_posix()


def write_yolo(folder: Path, name: str, annotations: Annotations, classes: Sequence[str]) -> Path:
    """Polygons for YOLO segmentation; an instance without pixels has no line.

    Args:
      classes: names of the classes, the same for all pictures, see :func:`write_classes`.

    Raises:
      ValueError: on a phrase that is not among them.
    """
    path = folder / "yolo" / f"{name}.txt"
    path.parent.mkdir(exist_ok=True)
    number = {phrase: i for i, phrase in enumerate(classes)}
    with replacing(path) as temporary:
        temporary.write_text("".join(_yolo_lines(annotations, number)), encoding="utf-8")
    return path


def write_classes(folder: Path, classes: Sequence[str]) -> Path:
    """The names of the classes, one a line, as :func:`write_yolo` counts them."""
    path = folder / "yolo" / "classes.txt"
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        lines = (" ".join(phrase.split()) + "\n" for phrase in classes)
        temporary.write_text("".join(lines), encoding="utf-8")
    return path


def _yolo_lines(annotations: Annotations, number: Mapping[str, int]) -> Iterator[str]:
    for item in annotations:
        if item["phrase"] not in number:
            known = ", ".join(number)
            raise ValueError(f"{item['phrase']!r} is not among the classes of the run ({known})")
        parts = _outlines(item["segmentation"])
        if parts:
            ring = join([ring for part in parts for ring in (part.outer, *part.holes)])
            height, width = item["segmentation"]["size"]
            corners = " ".join(f"{v:.6f}" for v in (ring / (width, height)).ravel())
            yield f"{number[item['phrase']]} {corners}\n"
