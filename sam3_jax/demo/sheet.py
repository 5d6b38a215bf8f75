"""A contact sheet of the demo's data: pictures, what is asked about them, and the answers."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask
from scipy import ndimage

from sam3_jax.data.placement import resize_mask
from sam3_jax.data.scenes import Pair, Scene

SIDE = 320  # of a tile
CAPTION = 30  # pixels below it
GAP = 8
SHADE = 0.45  # of what is not asked for
OUTLINE = 2  # pixels
PAPER, INK, FAINT = (250, 250, 248), (25, 25, 30), (150, 60, 60)


def draw_sheet(scenes: Sequence[Scene], asked: int = 3) -> UInt8[np.ndarray, "h w 3"]:
    """A row a picture: the picture as it is, phrases with their answers, one without any."""
    step = (SIDE + GAP, SIDE + CAPTION + GAP)
    size = (GAP + step[0] * (asked + 1), GAP + step[1] * len(scenes))
    sheet = Image.new("RGB", size, PAPER)
    for row, scene in enumerate(scenes):
        pixels = np.asarray(
            Image.open(io.BytesIO(scene.data)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        )
        top = GAP + row * step[1]
        sheet.paste(Image.fromarray(pixels), (GAP, top))
        for column, pair in enumerate(_shown(scene.pairs, asked), start=1):
            left = GAP + column * step[0]
            sheet.paste(Image.fromarray(_answered(pixels, pair)), (left, top))
            count = len(pair.instances)
            ImageDraw.Draw(sheet).text(
                (left + SIDE / 2, top + SIDE + CAPTION / 2),
                f"{pair.phrase}: {count or 'none'}",
                fill=INK if count else FAINT,
                font=ImageFont.load_default(18),
                anchor="mm",
            )
    return np.asarray(sheet)


def _shown(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """The phrases with the most words, and one that is not in the picture."""
    there = [pair for pair in pairs if pair.instances]
    absent = [pair for pair in pairs if not pair.instances]
    there.sort(key=lambda pair: -len(pair.phrase.split()))
    return (there[: count - 1] + absent)[:count]


def _answered(pixels: UInt8[np.ndarray, "s s 3"], pair: Pair) -> UInt8[np.ndarray, "s s 3"]:
    """The answer in its own colours, for colours are asked about; the rest grey and dark."""
    grey = pixels.mean(-1, keepdims=True, dtype=np.float32)
    dark = SHADE * (0.8 * grey + 0.2 * pixels)
    lit, edge = np.zeros((2, SIDE, SIDE), bool)
    for instance in pair.instances:
        mask = resize_mask(coco_mask.decode(instance.rle).astype(bool), (SIDE, SIDE))
        lit |= mask
        edge |= ndimage.binary_dilation(mask, iterations=OUTLINE) & ~mask
    shown = np.where(lit[..., None], pixels, dark)
    return np.where(edge[..., None], 255, shown).astype(np.uint8)
