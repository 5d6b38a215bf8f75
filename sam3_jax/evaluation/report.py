"""An evaluation as files: figures as JSON and as a table, and the rows behind them as CSV."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from sam3_jax.data.records import Dataset
from sam3_jax.evaluation.measure import Evaluation, pair_rows, phrase_rows
from sam3_jax.evaluation.predictions import Predictions
from sam3_jax.evaluation.tables import markdown, number, write_csv, write_json

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
    write_json(output / "metrics.json", data)
    table = format_table(evaluation)
    (output / "metrics.md").write_text(table + "\n", encoding="utf-8")
    write_csv(output / "phrases.csv", phrase_rows(dataset, evaluation))
    write_csv(output / "pairs.csv", pair_rows(dataset, evaluation))
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
        rows.append([title, *(number(scale * summaries[kind][name]) for kind in kinds)])
    for name in ("AP", "AP50", "AP75", "AR_100"):
        values = [evaluation.ap[k].summary[name] if k in evaluation.ap else math.nan for k in kinds]
        rows.append([f"COCO {name}", *(number(100 * value) for value in values)])
    if evaluation.miou:
        for title, value in (
            ("mIoU over phrases", evaluation.miou.miou),
            ("mean IoU of positive pairs", evaluation.miou.pair_iou),
            ("IoU of all pixels", evaluation.miou.overall_iou),
        ):
            rows.append([title, number(100 * value), *("" for _ in kinds[1:])])
    figures = evaluation.cgf1[evaluation.kind]
    foot = (
        f"{figures.pairs} image-phrase pairs: {figures.il_tp + figures.il_fn} with targets "
        f"({figures.il_fn} missed altogether), {figures.il_fp + figures.il_tn} without "
        f"({figures.il_fp} with something predicted)"
    )
    return f"{markdown(rows)}\n\n{foot}"


def _curves(figures: Any) -> dict[str, Any]:
    """Every part of cgF1 at every IoU threshold, and the counts."""
    values = {**figures._asdict(), "cgf1": figures.cgf1}
    return {k: v.tolist() if hasattr(v, "tolist") else v for k, v in values.items()}
