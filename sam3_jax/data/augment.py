"""Augmentation as decisions: functions of a numpy generator that draw placements and colours.

Two recipes. :func:`released` is that of the released fine-tuning configuration (upstream
``sam3/train/configs/roboflow_v100``): a square side from 480 to 992 in steps of 32, then padding
with black at random to 1008. :func:`paper` adds what the paper names: horizontal flips, mosaics of
up to 3 x 3 pictures, changes of colour; and crops.

A phrase limits what may be done to its picture: one with "left" or "right" is not mirrored, cut or
put into a mosaic, one that names a colour keeps its hue. Where a picture loses its colours
(``gray``), phrases that name one are not asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance

from sam3_jax.data.placement import Placement, Rect

_SIDES = re.compile(r"(?<![a-z])(left|right)", re.IGNORECASE)
_COLORS = re.compile(
    r"(?<![a-z])(red|green|blue|yellow|orange|purple|violet|pink|brown|black|white|gr[ae]y|golden|"
    r"gold|silver|beige|turquoise|cyan|magenta|maroon|tan|teal|colou?r\w*)(?![a-z])",
    re.IGNORECASE,
)


@dataclass
class AugmentConfig:
    """What may happen to a picture. Probabilities and strengths of 0 switch a change off."""

    resolution: int = 1008  # side of the canvas
    min_side: int = 480  # the picture's side is drawn from min_side, + step, ... max_side
    max_side: int = 1008
    side_step: int = 32
    flip: float = 0.0
    crop: float = 0.0
    crop_min: float = 0.5  # smallest share of a side that a crop keeps
    mosaic: float = 0.0
    mosaic_max: int = 3  # pictures along a side
    brightness: float = 0.0  # factors from 1 - x to 1 + x
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0  # share of the colour circle, to both sides
    gray: float = 0.0  # share of the pictures without colours, of which no phrase names one


def released(resolution: int = 1008) -> AugmentConfig:
    """The released fine-tuning recipe; sides scale with the resolution."""
    return AugmentConfig(resolution, min_side=round(480 / 1008 * resolution), max_side=resolution)


def paper(resolution: int = 1008) -> AugmentConfig:
    """The paper's augmentation. It gives no strengths: these are ours."""
    config = released(resolution)
    config.flip, config.crop, config.mosaic = 0.5, 0.3, 0.15
    config.brightness = config.contrast = config.saturation = 0.3
    config.hue = 0.05
    return config


def plain(resolution: int = 1008) -> AugmentConfig:
    """No change: the whole picture on the whole canvas, as in inference."""
    return AugmentConfig(resolution, min_side=resolution, max_side=resolution, side_step=1)


def names_color(phrase: str) -> bool:
    """Whether a phrase speaks of a colour."""
    return bool(_COLORS.search(phrase))


def is_sided(phrases: Iterable[str]) -> bool:
    """Whether a phrase speaks of left or right."""
    return any(_SIDES.search(phrase) for phrase in phrases)


def draw_grid(config: AugmentConfig, rng: np.random.Generator) -> tuple[int, int]:
    """Rows and columns of a mosaic, at least two pictures; (1, 1): none."""
    if rng.random() >= config.mosaic or config.mosaic_max < 2:
        return (1, 1)
    cells = int(rng.integers(1, config.mosaic_max**2))  # all but one picture alone
    return (cells // config.mosaic_max + 1, cells % config.mosaic_max + 1)


def draw_placements(
    sizes: Sequence[tuple[int, int]],
    grid: tuple[int, int],
    phrases: Sequence[str],
    config: AugmentConfig,
    rng: np.random.Generator,
) -> list[Placement]:
    """Where the pictures of a mosaic, or a single one, go.

    Args:
      sizes: (height, width) of the rows x columns pictures, row by row.
      grid: rows and columns.
      phrases: those that are asked about the pictures.
    """
    sides = range(config.min_side, config.max_side + 1, config.side_step)
    side = int(rng.choice(sides))
    left, top = (int(rng.integers(config.resolution - side + 1)) for _ in range(2))
    sided = is_sided(phrases)
    placements = []
    for number, size in enumerate(sizes):
        row, column = divmod(number, grid[1])
        y0, y1 = (top + i * side // grid[0] for i in (row, row + 1))
        x0, x1 = (left + i * side // grid[1] for i in (column, column + 1))
        flip, cut = rng.random() < config.flip, rng.random() < config.crop
        crop = _draw_crop(size, config.crop_min if cut and not sided else 1.0, rng)
        placements.append(Placement(crop, bool(flip and not sided), (x0, y0, x1, y1)))
    return placements


def _draw_crop(size: tuple[int, int], smallest: float, rng: np.random.Generator) -> Rect:
    """A rectangle whose sides are drawn by themselves, anywhere in the picture."""
    height, width = size
    w, h = (max(1, round(n * rng.uniform(smallest, 1.0))) for n in (width, height))
    x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    return (x, y, x + w, y + h)


def jitter_colors(
    image: UInt8[np.ndarray, "h w 3"],
    phrases: Sequence[str],
    config: AugmentConfig,
    rng: np.random.Generator,
) -> UInt8[np.ndarray, "h w 3"]:
    """Brightness, contrast and saturation in random order, then hue unless a phrase names one."""
    picture = Image.fromarray(image)
    steps = [
        (ImageEnhance.Brightness, config.brightness),
        (ImageEnhance.Contrast, config.contrast),
        (ImageEnhance.Color, config.saturation),
    ]
    for index in rng.permutation(len(steps)):
        enhance, strength = steps[index]
        factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
        if strength:
            picture = enhance(picture).enhance(factor)
    turn = round(255 * rng.uniform(-config.hue, config.hue))
    if turn and not any(map(names_color, phrases)):
        hsv = np.array(picture.convert("HSV"))
        hsv[..., 0] = (hsv[..., 0].astype(np.int16) + turn) % 256
        picture = Image.fromarray(hsv, "HSV").convert("RGB")
    return np.asarray(picture)


def remove_colors(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """The picture in shades of grey."""
    return np.asarray(Image.fromarray(image).convert("L").convert("RGB"))
