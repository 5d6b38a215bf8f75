"""What lies in the demo's pictures: objects, and the words that describe them."""

from __future__ import annotations

from typing import NamedTuple

SHAPES = ("circle", "ring", "square", "triangle", "star", "cross", "heart", "crescent")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 38),
    "orange": (250, 132, 16),
    "yellow": (250, 220, 40),
    "green": (40, 160, 60),
    "blue": (36, 92, 222),
    "purple": (126, 46, 172),
    "pink": (255, 140, 190),
    "white": (244, 244, 244),
}
PLAIN = "plain"  # is never asked for: most objects are, and a ring is no "plain" thing to say
TEXTURES = ("striped", "dotted", "checkered")
# Diameters in pixels of a picture of BASE_SIDE. Nothing lies between the two, so that every object
# is one or the other.
SIZES = {"small": (24.0, 34.0), "large": (46.0, 76.0)}
DIGIT_SIZES = {"small": (30.0, 40.0), "large": (54.0, 80.0)}  # heights: strokes are thin
BASE_SIDE = 256
# Too thin to show a texture when small.
THIN = frozenset({"ring", "cross", "star", "crescent"})

# Pairs that are in no training picture and in no training phrase. Every colour and every shape is
# in six other pairs at least.
UNSEEN = frozenset(
    {
        ("red", "crescent"),
        ("orange", "heart"),
        ("yellow", "star"),
        ("green", "ring"),
        ("green", "heart"),
        ("blue", "triangle"),
        ("blue", "star"),
        ("purple", "circle"),
        ("pink", "square"),
        ("white", "cross"),
    }
)


class Object(NamedTuple):
    """One object; whoever comes later in a list lies on top.

    To move it, replace ``x``, ``y``, ``rotation`` or ``diameter``; nothing else depends on them.
    """

    shape: str  # of SHAPES or DIGITS
    color: str
    texture: str  # PLAIN or of TEXTURES
    size: str
    rgb: tuple[int, int, int]  # near COLORS[color]
    sample: int  # which handwritten digit; -1: none
    x: float  # centre in pixels, from the left edge
    y: float
    diameter: float  # of the circle around it; of a digit, its height
    rotation: float  # radians, clockwise

    @property
    def is_digit(self) -> bool:
        """Whether it is a handwritten digit."""
        return self.shape in DIGITS
