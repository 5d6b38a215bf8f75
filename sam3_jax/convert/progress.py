"""Progress bars of the long steps."""

from __future__ import annotations

from collections.abc import Callable

from tqdm import tqdm

# From a label and a number of bytes to the function that hears of the bytes done.
Progress = Callable[[str, int], Callable[[int], object]]


def no_progress(label: str, total: int) -> Callable[[int], object]:
    """Shows nothing."""
    return lambda count: None


def progress_bar(label: str, total: int) -> Callable[[int], object]:
    """A bar on stderr where that is a terminal."""
    return tqdm(total=total, desc=f"{label:8}", unit="B", unit_scale=True, disable=None).update
