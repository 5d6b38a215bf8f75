"""Fonts for labels in any script, as far as the machine has them.

Pillow brings a font for Latin scripts. Where a label needs more, fonts that systems commonly have
are tried; characters that no font shows are left out, because a row of empty boxes tells nobody
anything.
"""

from __future__ import annotations

import functools

from PIL import ImageFont

# File names, which Pillow looks for where the system keeps its fonts.
NAMES = (
    "DejaVuSans.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSans-Regular.ttf",
    "wqy-microhei.ttc",
    "Arial Unicode.ttf",
    "PingFang.ttc",
    "AppleSDGothicNeo.ttc",
    "msyh.ttc",
    "seguisym.ttf",
)
NO_CHARACTER = "\U0010ffff"  # drawn as the box that stands for a missing character

Font = ImageFont.FreeTypeFont


def font_for(text: str, size: float) -> tuple[Font, str]:
    """A font, ``size`` pixels high, and the text on one line without what the font lacks."""
    text = " ".join(text.split())
    default = _font(None, size)
    if text.isascii() and text.isprintable():
        return default, text
    for font in (default, *(_font(name, size) for name in NAMES if _exists(name))):
        if all(_shows(font, c) for c in text):
            return font, text
    return default, " ".join("".join(c for c in text if _shows(default, c)).split())


@functools.lru_cache(maxsize=256)
def _font(name: str | None, size: float) -> Font:
    return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)


@functools.cache
def _exists(name: str) -> bool:
    try:
        ImageFont.truetype(name, 20)
    except OSError:
        return False
    return True


@functools.lru_cache(maxsize=4096)
def _shows(font: Font, character: str) -> bool:
    """Whether the font has more for a character than the box of a missing one."""
    if character == " ":
        return True
    drawn, box = font.getmask(character), font.getmask(NO_CHARACTER)
    return character.isprintable() and (drawn.size != box.size or bytes(drawn) != bytes(box))
