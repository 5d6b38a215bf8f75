"""One picture of a whole video: evenly spaced frames in a grid, each with its number and time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from sam3_jax.inference.files import replacing

GAP = 6  # pixels between tiles
CAPTION = 20  # pixels under each tile
BACKGROUND, INK = (18, 18, 20), (225, 225, 225)


class ContactSheet:
    """Takes a video's frames as they come and keeps small pictures of a few of them.

    The length need not be known: of every ``stride``-th frame a picture is kept, and when there
    are twice as many as asked for, every other one goes and the stride doubles.

    Args:
      count: tiles of the finished sheet at most.
      columns: tiles in a row.
      side: of a tile in pixels, its longer one.

    Raises:
      ValueError: unless all are positive.
    """

    def __init__(self, count: int = 12, columns: int = 4, side: int = 360):
        if min(count, columns, side) < 1:
            raise ValueError(f"must be positive: count {count}, columns {columns}, side {side}")
        self._count, self._columns, self._side = count, columns, side
        self._stride = 1
        self._kept: list[tuple[int, float, Image.Image]] = []

    def wants(self, index: int) -> bool:
        """Whether frame ``index`` would be kept; others need not be drawn."""
        return index % self._stride == 0

    def add(self, index: int, time: float, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """Takes frame ``index``, shown at ``time`` seconds; one that is not wanted is passed over.

        Frames come in order; one may be left out.
        """
        if not self.wants(index):
            return
        tile = Image.fromarray(image)
        tile.thumbnail((self._side, self._side), Image.Resampling.LANCZOS, reducing_gap=2.0)
        self._kept.append((index, time, tile))
        while len(self._kept) >= 2 * self._count and len(self._kept) > 1:
            self._stride *= 2
            self._kept = [kept for kept in self._kept if self.wants(kept[0])]

    def draw(self) -> UInt8[np.ndarray, "h w 3"]:
        """The sheet: the first and the last picture that are kept, and others evenly between.

        Raises:
          ValueError: without a frame.
        """
        if not self._kept:
            raise ValueError("a contact sheet needs at least one frame")
        n = min(self._count, len(self._kept))
        chosen = np.linspace(0, len(self._kept) - 1, n).round().astype(int)
        columns = min(self._columns, n)
        rows = -(-n // columns)
        width, height = self._kept[0][2].size
        step_x, step_y = width + GAP, height + CAPTION + GAP
        sheet = Image.new("RGB", (columns * step_x + GAP, rows * step_y + GAP), BACKGROUND)
        pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(CAPTION - 7)
        for place, kept in enumerate(chosen):
            index, time, tile = self._kept[kept]
            row, column = divmod(place, columns)
            x, y = GAP + column * step_x, GAP + row * step_y
            sheet.paste(tile, (x, y))
            middle = y + height + CAPTION / 2
            pen.text((x + width / 2, middle), _caption(index, time), INK, font, anchor="mm")
        return np.asarray(sheet)

    def write(self, path: Path) -> None:
        """Writes the sheet as a JPEG or PNG, by the suffix; at once or not at all.

        Raises:
          ValueError: without a frame, and on another suffix.
          OSError: with the file's name, when it cannot be written.
        """
        kinds = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}
        kind = kinds.get(path.suffix.lower())
        if kind is None:
            raise ValueError(f"{path}: name a contact sheet {' '.join(kinds)}")
        sheet = Image.fromarray(self.draw())
        with replacing(path) as temporary:
            sheet.save(temporary, kind, **({"quality": 92} if kind == "JPEG" else {}))


def _caption(index: int, time: float) -> str:
    minutes, seconds = divmod(time, 60)
    hours, minutes = divmod(int(minutes), 60)
    clock = f"{hours}:{minutes:02d}" if hours else f"{minutes}"
    return f"frame {index}, {clock}:{seconds:04.1f}"
