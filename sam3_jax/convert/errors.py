"""What conversion raises, and how it words a list of problems."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

SHOWN = 40  # problems printed in full; one wrong size makes hundreds of the same kind


class ConversionError(Exception):
    """The input cannot be converted. The text names the file, every problem, and the remedy."""


def raise_problems(where: str, problems: Sequence[str]) -> None:
    """Raises one :class:`ConversionError` for all problems; does nothing where there are none."""
    if not problems:
        return
    shown = [f"  - {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        shown.append(f"  ... and {len(problems) - SHOWN} more of them")
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise ConversionError("\n".join([f"{where}: {count}, nothing was written", *shown]))


def closest(name: str, names: Iterable[str]) -> str:
    """The name most like ``name`` as ``"; the closest is ..."``, or nothing if none is like it."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.8)
    return f"; the closest is {found[0]}" if found else ""
