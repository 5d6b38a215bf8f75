"""An evaluation as files: figures as JSON and as a table, and the rows behind them as CSV."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sam3_jax.data.records import Dataset
from sam3_jax.evaluation.measure import Evaluation, pair_rows, phrase_rows
from sam3_jax.evaluation.predictions import Predictions

SCHEMA_VERSION = 1
TITLES = {"segm": "masks", "bbox": "boxes"}


def write_report(
    output: Path,
    dataset: Dataset,
    predictions: Predictions,
    evaluation: Evaluation,
    info: dict[str, Any],
) -> str:
    """Writes ``metrics.json``, ``metrics.md``, ``phrases.csv`` and ``pairs.csv``.

    Args:
      output: an existing folder.
      dataset: the ground truth.
      predictions: what was measured.
      evaluation: the figures.
      info: facts about the run, for the JSON.

    Returns:
      the table, for the terminal.

    Raises:
      OSError: when a file cannot be written.
    """
    data = {
        "schema_version": SCHEMA_VERSION,
        "info": info,
        "ground_truth": dataset.sources,
        "layout": dataset.layout,
        "annotators": len(dataset.sources),
        "score_threshold": evaluation.threshold,
        "pairs": {
            "in_file": len(dataset.records),
            "scored_by_cgF1": len(evaluation.pairs[evaluation.kind]),
            "scored_by_mIoU": len(evaluation.regions),
        },
        "metrics": evaluation.metrics(),
        "by_IoU_threshold": {kind: _curves(f) for kind, f in evaluation.cgf1.items()},
        "problems": {
            "ground_truth": dataset.problems.found,
            "predictions": predictions.problems.found,
            "failed_pictures": predictions.failed,
            "notes": predictions.notes,
        },
    }
    text = json.dumps(_without_nan(data), indent=1, ensure_ascii=False)
    (output / "metrics.json").write_text(text + "\n", encoding="utf-8")
    table = format_table(evaluation)
    (output / "metrics.md").write_text(table + "\n", encoding="utf-8")
    _write_csv(output / "phrases.csv", phrase_rows(dataset, evaluation))
    _write_csv(output / "pairs.csv", pair_rows(dataset, evaluation))
    return table


def format_table(evaluation: Evaluation) -> str:
    """The figures in percent as Markdown, one column a kind of IoU."""
    kinds = list(evaluation.pairs)
    summaries = {kind: figures.summary() for kind, figures in evaluation.cgf1.items()}
    rows = [["", *(TITLES[kind] for kind in kinds)]]
    for title, name in (
        ("cgF1", "cgF1"),
        ("  pmF1", "positive_micro_F1"),
        ("  IL_MCC (-1 to 1)", "IL_MCC"),
        ("cgF1 at IoU .50", "cgF1@0.5"),
        ("cgF1 at IoU .75", "cgF1@0.75"),
        ("IL_F1", "IL_F1"),
        ("F1, all pairs", "F1"),
        ("macro F1, positive pairs", "positive_macro_F1"),
    ):
        scale = 1 if name == "IL_MCC" else 100
        rows.append([title, *(_number(scale * summaries[kind][name]) for kind in kinds)])
    for name in ("AP", "AP50", "AP75", "AR_100"):
        values = [evaluation.ap[k].summary[name] if k in evaluation.ap else math.nan for k in kinds]
        rows.append([f"COCO {name}", *(_number(100 * value) for value in values)])
    if evaluation.miou:
        for title, value in (
            ("mIoU over phrases", evaluation.miou.miou),
            ("mean IoU of positive pairs", evaluation.miou.pair_iou),
            ("IoU of all pixels", evaluation.miou.overall_iou),
        ):
            rows.append([title, _number(100 * value), *("" for _ in kinds[1:])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_line(row, widths) for row in rows]
    rule = "|".join(["", "-" * (widths[0] + 2), *(f"{'-' * (w + 1)}:" for w in widths[1:]), ""])
    figures = evaluation.cgf1[evaluation.kind]
    foot = (
        f"{figures.pairs} image-phrase pairs: {figures.il_tp + figures.il_fn} with targets "
        f"({figures.il_fn} missed altogether), {figures.il_fp + figures.il_tn} without "
        f"({figures.il_fp} with something predicted)"
    )
    return "\n".join([lines[0], rule, *lines[1:], "", foot])


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        row[0].ljust(widths[0]),
        *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
    ]
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _curves(figures: Any) -> dict[str, Any]:
    """Every part of cgF1 at every IoU threshold, and the counts."""
    values = {**figures._asdict(), "cgf1": figures.cgf1}
    return {k: v.tolist() if hasattr(v, "tolist") else v for k, v in values.items()}


def _without_nan(value: Any) -> Any:
    """JSON has no nan: null says that there is nothing to average."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list) else value


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Fractions with six digits; an empty cell where there is nothing to average."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0] if rows else ["phrase"])
        for row in rows:
            values = [f"{v:.6f}" if isinstance(v, float) else v for v in row.values()]
            writer.writerow("" if v in (None, "nan") else v for v in values)
