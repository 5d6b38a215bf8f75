"""A small real data set: ``python -m sam3_jax.demo.coins data/coins``.

scikit-image's photograph of 24 coins, with masks by the segmentation of its gallery, in crops: the
upper twelve coins to train on, the lower twelve held out. Crops of grass, gravel and brick show no
coin, and no picture shows the second category.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sam3_jax.inference.rle import encode_mask

SIDE = 112  # of the crops, in pixels of the photograph
MIDDLE = 150  # no coin crosses this row
LEAST = 0.25  # of a coin is seen in a crop, or nothing of it
ANNOTATIONS = "annotations.json"

Picture = tuple[np.ndarray, list[np.ndarray]]  # pixels and the masks of its coins


def coins() -> Picture:
    """The photograph, 303 x 384, and its coins: regions of the watershed of its edges."""
    from scipy import ndimage
    from skimage import data, filters, measure, segmentation  # an extra

    photo = data.coins()
    markers = np.where(photo < 30, 1, np.where(photo > 150, 2, 0))
    inside = segmentation.watershed(filters.sobel(photo), markers) == 2
    labels, _ = ndimage.label(ndimage.binary_fill_holes(inside))
    regions = [region.label for region in measure.regionprops(labels) if region.area > 100]
    return photo, [labels == label for label in regions]


def crops(first: int, last: int, steps: tuple[int, int]) -> Iterator[Picture]:
    """Squares of rows ``first`` to ``last``, ``steps`` (down, right) apart.

    Only those in which every coin is seen to a quarter at least, or not at all.
    """
    photo, masks = coins()
    for y in range(first, last - SIDE + 1, steps[0]):
        for x in range(0, photo.shape[1] - SIDE + 1, steps[1]):
            cut = np.s_[y : y + SIDE, x : x + SIDE]
            seen = [mask[cut].sum() / mask.sum() for mask in masks]
            if all(share == 0 or share > LEAST for share in seen):
                yield photo[cut], [m[cut] for m, share in zip(masks, seen, strict=True) if share]


def textures(columns: slice, count: int) -> Iterator[Picture]:
    """Squares without coins, ``count`` of each photograph's columns."""
    from skimage import data

    for load in (data.grass, data.gravel, data.brick):
        photo = load()[:, columns]
        for i in range(count):
            yield photo[100 * i : 100 * i + SIDE, 20 * i : 20 * i + SIDE], []


def write_coco(folder: Path, pictures: Sequence[Picture]) -> Path:
    """Pictures, and a COCO file that says which coins they show; returns the file.

    Raises:
      OSError: when ``folder`` exists or cannot be written.
    """
    folder.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (pixels, masks) in enumerate(pictures):
        name = f"{number:03d}.png"
        Image.fromarray(pixels).convert("RGB").save(folder / name)
        images.append({"id": number, "file_name": name, "height": SIDE, "width": SIDE})
        for mask in masks:
            rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
            box = [columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 1,
                    "bbox": [int(value) for value in box],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": encode_mask(mask),
                }
            )
    names = [{"id": 1, "name": "coin"}, {"id": 2, "name": "button"}]
    content = {"images": images, "annotations": annotations, "categories": names}
    file = folder / ANNOTATIONS
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def write_ten(folder: Path) -> list[Path]:
    """Ten pictures to train on and ten held out; returns their annotation files.

    Raises:
      OSError: when a folder exists or cannot be written.
    """
    train = [*list(crops(0, MIDDLE, (12, 14)))[::3][:8], *list(textures(slice(256), 1))[:2]]
    valid = [*list(crops(MIDDLE, 303, (10, 18)))[::3][:8], *list(textures(slice(256, None), 1))[:2]]
    return [write_coco(folder / "train", train), write_coco(folder / "valid", valid)]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sam3_jax.demo.coins",
        description="Writes ten pictures of coins to train on and ten of other coins, held out, "
        "with COCO annotations.",
    )
    parser.add_argument("output", metavar="DIR", type=Path, help="makes DIR/train and DIR/valid")
    args = parser.parse_args(argv)
    try:
        files = write_ten(args.output)
    except FileExistsError as error:
        print(f"error: {error.filename} exists; choose another folder", file=sys.stderr)
        return 2
    except (ModuleNotFoundError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, files)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
