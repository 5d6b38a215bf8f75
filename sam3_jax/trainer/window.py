"""Means over the steps between two lines of the log."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tqdm import tqdm

LATEST = ("rate", "skipped", "skipped_in_a_row")  # metrics of which a mean says nothing


class Window:
    """The steps since the last line."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self._seconds: list[float] = []
        self._waited = self._compile_s = 0.0

    def add(
        self, metrics: dict[str, float], seconds: float, waited: float, *, compiled: bool
    ) -> None:
        """A step that took ``seconds``, ``waited`` of them for data.

        Where a program was ``compiled`` meanwhile, its times are kept out of the means.
        """
        self.metrics.append(metrics)
        if compiled:
            self._compile_s += seconds
        else:
            self._seconds.append(seconds)
            self._waited += waited

    def values(
        self, images_per_step: int, peak_rate: float | None
    ) -> dict[str, float | int | None]:
        """What a ``train`` line holds, see ``logs.py``.

        Args:
          peak_rate: steps a second at which the devices would be used to the full.
        """
        values: dict[str, float | int | None] = {"steps": len(self.metrics)}
        for name in dict.fromkeys(name for metrics in self.metrics for name in metrics):
            column = [metrics[name] for metrics in self.metrics if name in metrics]
            values[name] = column[-1] if name in LATEST else _mean(column)
        step_s = _mean(self._seconds)
        values |= {"step_s": step_s, "images_per_s": None, "data_wait": None, "mfu": None}
        if step_s:
            values["images_per_s"] = images_per_step / step_s
            values["data_wait"] = min(self._waited / sum(self._seconds), 1.0)
            values["mfu"] = 1 / step_s / peak_rate if peak_rate else None
        return values | {"compile_s": self._compile_s}


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else None


def _short(value: float) -> str:
    """Three digits, without an exponent: 0.0123, 1130."""
    return f"{float(f'{value:.3g}'):g}"


def summary(values: dict[str, float | int | None], left: int) -> str:
    """A window in a few words; ``left``: steps to come."""
    loss, seconds = values.get("loss"), values["step_s"]
    parts = [f"loss {loss:.4g}" if loss is not None else "loss not finite"]
    if seconds:
        parts += [f"{_short(seconds)} s/step", f"{_short(values['images_per_s'])} images/s"]
        parts.append(f"data wait {values['data_wait']:.0%}")
        if values["mfu"] is not None:
            parts.append(f"MFU {values['mfu']:.0%}")
        parts.append(f"left {tqdm.format_interval(left * seconds)}")
    if values["compile_s"]:
        parts.append(f"compiled {values['compile_s']:.0f} s")
    if values.get("skipped"):
        parts.append(f"{values['skipped']:.0f} skipped")
    return ", ".join(parts)
