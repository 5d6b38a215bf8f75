"""Figures and rows as Markdown, JSON and CSV."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its head, the first column goes to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_line(row, widths) for row in rows]
    rule = "|".join(["", "-" * (widths[0] + 2), *(f"{'-' * (w + 1)}:" for w in widths[1:]), ""])
    return "\n".join([lines[0], rule, *lines[1:]])


def number(value: float) -> str:
    """Two digits; a dash where there is nothing to average."""
    return "-" if math.isnan(value) else f"{value:.2f}"


def write_json(path: Path, data: Any) -> None:
    """A file with null in place of nan, which JSON lacks."""
    text = json.dumps(_without_nan(data), indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Fractions with six digits; an empty cell where there is nothing to average."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0] if rows else ["phrase"])
        for row in rows:
            values = [f"{v:.6f}" if isinstance(v, float) else v for v in row.values()]
            writer.writerow("" if v in (None, "nan") else v for v in values)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        row[0].ljust(widths[0]),
        *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
    ]
    return f"| {' | '.join(cells)} |"


def _without_nan(value: Any) -> Any:
    """JSON has no nan: null says that there is nothing to average."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list) else value
