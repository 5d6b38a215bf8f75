"""Pictures of the demo's answers: what was found stays in its colours, the rest is dimmed.

Colours are what is asked about: a tint, as ``inference/visualize.py`` lays over masks, would hide
them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw
from scipy import ndimage

from sam3_jax.demo.questions import Question
from sam3_jax.inference.fonts import font_for
from sam3_jax.inference.visualize import palette

TILE = 512  # the longer side of a picture in its tile
CAPTION = 92  # pixels below it
TEXT = 34.0  # size of its font
GAP = 12
COLUMNS = 5
DIM, GREY = 0.5, 0.55  # of what was not found: how bright, how colourless
OUTLINE = 3  # pixels
PAPER, INK, FAINT = (255, 255, 255), (22, 24, 28), (105, 110, 120)
MARK = (255, 214, 10)  # boxes and clicks


def draw_tile(
    pixels: UInt8[np.ndarray, "h w 3"],
    masks: Bool[np.ndarray, "n h w"],
    question: Question,
    answer: str,
) -> UInt8[np.ndarray, "_ _ 3"]:
    """One answer: the picture with the instances, under it the prompt and ``answer``."""
    height, width = pixels.shape[:2]
    scale = TILE / max(height, width)
    size = round(width * scale), round(height * scale)
    shown = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    larger = [_resized(mask, size) for mask in masks]
    picture = Image.fromarray(_lit(np.asarray(shown), larger))
    _draw_prompt(picture, question, scale)
    tile = Image.new("RGB", (TILE, TILE + CAPTION), PAPER)
    tile.paste(picture, ((TILE - size[0]) // 2, (TILE - size[1]) // 2))
    pen = ImageDraw.Draw(tile)
    prompt = f"“{question.prompt}”" if question.prompt == question.text else question.prompt
    for line, (text, ink) in enumerate(((prompt, INK), (answer, FAINT))):
        font, text = font_for(text, TEXT)
        font, text = font_for(text, TEXT * min(1.0, (TILE - GAP) / max(font.getlength(text), 1)))
        pen.text((TILE / 2, TILE + CAPTION * (0.3 + 0.45 * line)), text, ink, font, anchor="mm")
    return np.asarray(tile)


def draw_overview(
    tiles: Sequence[UInt8[np.ndarray, "h w 3"]], columns: int = COLUMNS
) -> UInt8[np.ndarray, "_ _ 3"]:
    """All tiles side by side, in rows of ``columns``."""
    height, width = tiles[0].shape[:2]
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), PAPER)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        sheet.paste(Image.fromarray(tile), (column * (width + GAP), row * (height + GAP)))
    return np.asarray(sheet)


def _resized(mask: Bool[np.ndarray, "h w"], size: tuple[int, int]) -> Bool[np.ndarray, "_ _"]:
    grey = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(grey) > 127


def _lit(
    pixels: UInt8[np.ndarray, "h w 3"], masks: Sequence[Bool[np.ndarray, "h w"]]
) -> UInt8[np.ndarray, "h w 3"]:
    """The masks as they are, each with an outline of its own colour; all else dark and greyish."""
    grey = pixels.mean(-1, keepdims=True, dtype=np.float32)
    shown = DIM * (GREY * grey + (1 - GREY) * pixels)
    for mask in masks:
        shown[mask] = pixels[mask]
    for mask, color in zip(masks, palette(len(masks)), strict=True):
        shown[ndimage.binary_dilation(mask, iterations=OUTLINE) & ~mask] = color
    return shown.astype(np.uint8)


def _draw_prompt(picture: Image.Image, question: Question, scale: float) -> None:
    pen = ImageDraw.Draw(picture)
    if question.box is not None:
        x0, y0, x1, y1 = (scale * value for value in question.box)
        for out, color, line in ((7, INK, 8), (5, MARK, 4)):
            pen.rectangle((x0 - out, y0 - out, x1 + out, y1 + out), outline=color, width=line)
    if question.point is not None:
        x, y = (scale * value for value in question.point)
        for radius, color in ((13, INK), (11, PAPER), (7, MARK)):
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
