"""Pictures of instances: tinted masks, smooth outlines, tags with label and score.

Everything scales with the picture, so a thumbnail and a 6000 px photograph look alike.
"""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from sam3_jax.inference.fonts import Font, font_for
from sam3_jax.inference.postprocess import Detections

FILL = 0.42  # opacity of a mask's tint
TAG_FILL = 0.88
TAG_WIDTH = 0.5  # of the picture's width
LONGEST = 100  # characters of a tag
TAG_SHARE = 0.25  # of the picture may be covered by tags; worse instances then go without
Color = tuple[int, int, int]
CHOSEN: tuple[Color, ...] = (
    (38, 139, 255),  # blue
    (255, 106, 19),  # orange
    (54, 196, 62),  # green
    (240, 60, 190),  # magenta
    (0, 200, 200),  # turquoise
    (255, 200, 10),  # yellow
    (140, 82, 255),  # violet
    (240, 50, 60),  # red
    (160, 214, 30),  # lime
    (255, 140, 165),  # pink
)


class Rect(NamedTuple):
    """Pixels from (x0, y0) up to, but without, column x1 and row y1."""

    x0: int
    y0: int
    x1: int
    y1: int


def palette(n: int) -> list[Color]:
    """``n`` distinct vivid colours; the i-th does not depend on ``n``.

    A few chosen ones, then hues that step by the golden ratio, so that neighbours in the list stay
    far apart; greens and yellows are darkened a little, because they look brighter than the rest.
    """
    colors = list(CHOSEN[:n])
    for i in range(n - len(colors)):
        hue = (0.05 + i * 0.618034) % 1.0
        value = 0.85 if 0.1 < hue < 0.5 else 1.0
        rgb = colorsys.hsv_to_rgb(hue, (0.9, 0.65)[i % 2], value)
        colors.append(tuple(round(255 * c) for c in rgb))
    return colors


def overlay(
    image: UInt8[np.ndarray, "h w 3"],
    detections: Detections,
    labels: str | Sequence[str] | None = None,
    *,
    show_scores: bool = True,
) -> UInt8[np.ndarray, "h w 3"]:
    """Draws instances over a picture and returns a new one.

    Args:
      image: RGB.
      detections: instances whose masks have the size of ``image``.
      labels: one text for all instances or one for each; None shows scores only.
      show_scores: append the score to every tag; without labels too, there are no tags.

    Raises:
      ValueError: when the masks do not fit the image or the labels the number of instances.
    """
    height, width = image.shape[:2]
    n = len(detections.scores)
    if detections.masks.shape != (n, height, width):
        raise ValueError(
            f"masks of shape {detections.masks.shape} do not fit {n} scores on an image of "
            f"{height} x {width} pixels; use the detections of this image"
        )
    texts = [labels or ""] * n if labels is None or isinstance(labels, str) else list(labels)
    if len(texts) != n:
        raise ValueError(f"{len(texts)} labels for {n} instances; give one text or one for each")
    if show_scores:
        scores = detections.scores
        texts = [f"{text} {score:.2f}".strip() for text, score in zip(texts, scores, strict=True)]

    extents = [extent_of(mask) for mask in detections.masks]
    areas = np.asarray([np.count_nonzero(mask) for mask in detections.masks], np.int64)

    def crop_of(i: int) -> Bool[np.ndarray, "h w"]:
        x0, y0, x1, y1 = extents[i]
        return detections.masks[i, y0:y1, x0:x1]

    return draw(image, crop_of, extents, areas, detections.scores, texts)


def draw(
    image: UInt8[np.ndarray, "h w 3"],
    crop_of: Callable[[int], Bool[np.ndarray, "_ _"]],
    extents: Sequence[Rect | None],
    areas: Int[np.ndarray, " n"],
    scores: Float[np.ndarray, " n"],
    texts: Sequence[str],
    colors: Sequence[Color] | None = None,
) -> UInt8[np.ndarray, "h w 3"]:
    """Draws one mask after the other over a picture and returns a new one; see :func:`overlay`.

    Args:
      image: RGB.
      crop_of: gives the i-th mask within its extent, asked once for each that is not empty: those
        of a crowd on a large picture take GB, so they may be unpacked one at a time.
      extents: the rectangle around each mask, None for an empty one.
      areas: of the masks in pixels.
      scores: the best are labelled first.
      texts: for each a label, which may be empty.
      colors: one for each; None: those of :func:`palette`.
    """
    height, width = image.shape[:2]
    colors = palette(len(scores)) if colors is None else colors
    line = max(1.4, 0.0028 * (height * width) ** 0.5)
    canvas = Image.fromarray(image).copy()
    # Small instances last: they stay visible in front of large ones.
    for i in np.argsort(-areas, kind="stable").tolist():
        if extents[i] is not None:
            _draw_mask(canvas, crop_of(i), extents[i], colors[i], line)
    _draw_tags(canvas, extents, scores, texts, colors)
    return np.asarray(canvas)


def extent_of(mask: Bool[np.ndarray, "h w"]) -> Rect | None:
    """Smallest rectangle around the True pixels, None without any."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return Rect(int(cols[0]), int(rows[0]), int(cols[-1]) + 1, int(rows[-1]) + 1)


def _draw_mask(
    canvas: Image.Image, crop: Bool[np.ndarray, "_ _"], extent: Rect, color: Color, line: float
) -> None:
    """Tints one mask in place and draws its outline, ``line`` pixels wide, with a dark rim."""
    pad = int(np.ceil(3 * line)) + 1
    x0, y0 = max(extent.x0 - pad, 0), max(extent.y0 - pad, 0)
    x1, y1 = min(extent.x1 + pad, canvas.width), min(extent.y1 + pad, canvas.height)
    inside = Image.new("L", (x1 - x0, y1 - y0))
    inside.paste(Image.fromarray(crop.view(np.uint8) * 255), (extent.x0 - x0, extent.y0 - y0))
    # Blurred, an edge becomes a ramp: bands of it are outlines of even width in all directions.
    halved = _blur(inside, line).point([v // 2 for v in range(256)])
    where = ImageChops.add(halved, inside.point([128 * (v > 0) for v in range(256)]))
    share, tone = _inks()
    ink = Image.merge("RGB", [where.point(_table(tone * c / 255)) for c in color])
    canvas.paste(ink, (x0, y0), where.point(_table(share)))


@functools.cache
def _inks() -> tuple[np.ndarray, np.ndarray]:
    """Opacity and brightness of the ink: a tint, a dark rim over it, the outline over both.

    For each value of half the ramp (0..127), then for the same inside the mask.
    """
    ramp, inside = np.tile(np.arange(128) / 127, 2), np.arange(256) >= 128
    rim, outline = 0.45 * _band(ramp, 0.12, 0.40), _band(ramp, 0.35, 0.75)
    share = 1 - (1 - FILL * inside) * (1 - rim) * (1 - outline)
    colored = FILL * inside * (1 - rim) * (1 - outline) + outline
    return share, np.divide(colored, share, out=np.zeros(256), where=share > 0)


def _table(shares: np.ndarray) -> list[int]:
    """Shares 0..1 of the values of a pixel, as Pillow takes them."""
    return np.rint(255 * shares).astype(int).tolist()


def _blur(image: Image.Image, radius: float) -> Image.Image:
    """Gaussian blur; a wide one at less resolution, which is as smooth and many times as fast."""
    factor = min(max(1, int(radius / 1.5)), 6)
    if factor == 1:
        return image.filter(ImageFilter.GaussianBlur(radius))
    small = image.reduce(factor).filter(ImageFilter.GaussianBlur(radius / factor))
    box = (0, 0, image.width / factor, image.height / factor)
    return small.resize(image.size, Image.Resampling.BILINEAR, box)


def _band(ramp: np.ndarray, low: float, high: float) -> np.ndarray:
    """1 where ``ramp`` lies between two values, falling to 0 softly on either side."""
    soft = 0.12
    return np.clip(np.minimum(ramp - low, high - ramp) / soft + 0.5, 0, 1)


def _draw_tags(
    canvas: Image.Image,
    extents: Sequence[Rect | None],
    scores: Float[np.ndarray, " n"],
    texts: Sequence[str],
    colors: Sequence[Color],
) -> None:
    """Writes the texts next to their instances, best score first at the best places."""
    width, height = canvas.size
    pen = ImageDraw.Draw(canvas, "RGBA")
    size = max(11.0, 0.02 * (height * width) ** 0.5)
    pad = max(2, round(0.28 * size))
    ascent, descent = font_for("", size)[0].getmetrics()
    tag_height = ascent + descent + pad
    taken: list[Rect] = []
    room = TAG_SHARE * height * width
    for i in np.argsort(-scores, kind="stable"):
        extent = extents[i]
        room_for_text = int(min(width - 2 * pad, max(TAG_WIDTH * width, 6 * size)))
        font, text = font_for(texts[i], size)
        text = _shorten(text, font, room_for_text)
        tag_width = round(font.getlength(text)) + 2 * pad
        room -= tag_width * tag_height
        if extent is None or not text or (taken and room < 0):
            continue
        rect = _place((tag_width, tag_height), extent, (width, height), taken)
        taken.append(rect)
        pen.rounded_rectangle(rect, radius=pad, fill=(*colors[i], round(255 * TAG_FILL)))
        middle = (rect.y0 + rect.y1) / 2
        pen.text((rect.x0 + pad, middle), text, _ink(colors[i]), font, anchor="lm")


def _shorten(text: str, font: Font, room: int) -> str:
    """Cuts a text that is wider than ``room`` pixels before its last word, which is the score."""
    if len(text) < LONGEST and font.getlength(text) <= room:
        return text
    start, _, last = text.rpartition(" ")
    for kept in range(min(len(start), LONGEST), 0, -1):
        short = f"{start[:kept].rstrip()}... {last}"
        if font.getlength(short) <= room:
            return short
    return last if len(last) < LONGEST and font.getlength(last) <= room else ""


def _ink(color: Color) -> Color:
    """Black or white, whichever reads better on ``color`` (relative luminance of WCAG)."""
    linear = [(c / 255) ** 2.2 for c in color]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)


def _place(
    tag: tuple[int, int], extent: Rect, size: tuple[int, int], taken: Sequence[Rect]
) -> Rect:
    """Where a tag of (width, height) goes: the first free place, else the least covered one."""
    best, least = None, None
    for x, y in _places(tag, extent):
        x = min(max(x, 0), max(size[0] - 1 - tag[0], 0))
        y = min(max(y, 0), max(size[1] - 1 - tag[1], 0))
        rect = Rect(x, y, x + tag[0], y + tag[1])
        covered = sum(_overlap(rect, other) for other in taken)
        if covered == 0:
            return rect
        if least is None or covered < least:
            best, least = rect, covered
    return best


def _places(tag: tuple[int, int], extent: Rect) -> Iterator[tuple[int, int]]:
    """Top left corners to try: over the instance, under it, in it, beside it, then further away."""
    width, height = tag
    x0, y0, x1, y1 = extent
    middle = (x0 + x1 - width) // 2
    for step in range(4):
        above, below = y0 - height * (step + 1), y1 + height * step
        for y in (above, below, y0 + height * step, y1 - height * (step + 1)):
            for x in (middle, x0, x1 - width):
                yield x, y
        yield x1 + width * step, (y0 + y1 - height) // 2
        yield x0 - width * (step + 1), (y0 + y1 - height) // 2


def _overlap(a: Rect, b: Rect) -> int:
    """Common area of two rectangles in pixels."""
    across = min(a.x1, b.x1) - max(a.x0, b.x0)
    down = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(across, 0) * max(down, 0)
