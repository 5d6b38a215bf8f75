"""How the commands' arguments are written: text -> values, for argparse's ``type``.

Each raises ``argparse.ArgumentTypeError``, with the text and what is expected instead.
"""

from __future__ import annotations

import argparse
from fractions import Fraction


def _signed(text: str, form: str) -> tuple[tuple[float, ...], int]:
    """Numbers as many as ``form`` names, then maybe + or -, all separated by commas."""
    count = len(form.split(","))
    parts = [part.strip() for part in text.split(",")]
    sign = parts.pop() if len(parts) == count + 1 else "+"
    try:
        values = tuple(map(float, parts))
    except ValueError:
        values = ()
    if len(values) != count or sign not in ("+", "-"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not {form} in pixels, optionally with ,+ or ,- (not like this)"
        )
    return values, int(sign == "+")


def parse_box(text: str) -> tuple[tuple[float, ...], int]:
    """``"x0,y0,x1,y1"``, optionally ``",+"`` or ``",-"``, -> box and label (1 or 0)."""
    return _signed(text, "x0,y0,x1,y1")


def parse_point(text: str) -> tuple[tuple[float, ...], int]:
    """``"x,y"``, optionally ``",+"`` or ``",-"``, -> point and label (1 or 0)."""
    return _signed(text, "x,y")


def parse_threshold(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def parse_count(text: str) -> int:
    """A number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


def parse_positive(text: str) -> int:
    """A number from 1 on."""
    value = parse_count(text)
    if not value:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def parse_shard(text: str) -> tuple[int, int]:
    """``"I/N"``: the part with number I (from 0) of N."""
    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N-1, such as 0/4")
    return int(first), int(second)


def parse_span(text: str) -> tuple[int, int | None, int]:
    """``"START:STOP:STEP"``, each of which may be left out, as in a slice of Python."""
    parts = [part.strip() for part in text.split(":")]
    if not 2 <= len(parts) <= 3 or not all(part.isdecimal() or not part for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not START:STOP:STEP, such as 100:400 or ::5")
    start, stop, step = (int(part) if part else None for part in [*parts, ""][:3])
    start, step = start or 0, 1 if step is None else step
    if step < 1 or (stop is not None and stop <= start):
        raise argparse.ArgumentTypeError(f"{text!r} is no frame: START < STOP, STEP from 1 on")
    return start, stop, step


def parse_rate(text: str) -> Fraction:
    """A number of frames a second, also as a quotient such as 30000/1001."""
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not 0 < rate <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of frames a second up to 1000")
    return rate
