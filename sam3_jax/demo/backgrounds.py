"""Photographs behind the objects: crops of those that scikit-image ships.

All are CC0 or in the public domain, by scikit-image's own account of each: astronaut (NASA, public
domain), brick and gravel (CC0Textures, CC0), camera (Lav Varshney, CC0), chelsea (Stefan van der
Walt, CC0), coffee (Rachel Michetti, CC0), grass (linolafett, CC0), hubble_deep_field (NASA, public
domain), retina (Mikael Häggström, CC0), rocket (SpaceX, public domain).

Coins is never used: the demo shows it. Nor are clock, cell and moon, which are "circles".
"""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import UInt8
from PIL import Image

TRAINING = ("astronaut", "brick", "chelsea", "coffee", "grass", "hubble_deep_field", "retina")
HELD_OUT = ("camera", "gravel", "rocket")
# Side of a crop, as a share of the shorter side. The retina as a whole is a disc.
CROP = {"retina": (0.2, 0.5), "hubble_deep_field": (0.3, 0.6)}
ANY_CROP = (0.4, 1.0)


@functools.cache
def photograph(name: str) -> UInt8[np.ndarray, "h w 3"]:
    """One of scikit-image's photographs, in RGB; the largest at half size."""
    import skimage.data  # an extra

    pixels = getattr(skimage.data, name)()
    picture = Image.fromarray(pixels).convert("RGB")
    return np.asarray(picture.reduce(2) if min(picture.size) > 1000 else picture)


def draw_background(
    side: int, rng: np.random.Generator, *, held_out: bool
) -> UInt8[np.ndarray, "s s 3"]:
    """A random square crop: resized, flipped, and with other light."""
    names = HELD_OUT if held_out else TRAINING
    name = names[int(rng.integers(len(names)))]
    pixels = photograph(name)
    height, width = pixels.shape[:2]
    low, high = CROP.get(name, ANY_CROP)
    size = round(min(height, width) * (low + (high - low) * rng.random()))
    top = int(rng.integers(height - size + 1))
    left = int(rng.integers(width - size + 1))
    crop = Image.fromarray(pixels[top : top + size, left : left + size])
    crop = np.asarray(crop.resize((side, side), Image.Resampling.BICUBIC))
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    contrast = 0.55 + 0.5 * rng.random()
    brightness = 105 + 60 * rng.random()
    tint = 0.92 + 0.16 * rng.random(3)
    mean = crop.mean(dtype=np.float64)
    light = (crop - np.float32(mean)) * np.float32(contrast) + np.float32(
        0.5 * mean + 0.5 * brightness
    )
    return np.clip(light * tint.astype(np.float32), 0, 255).astype(np.uint8)
