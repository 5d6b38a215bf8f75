"""An evaluation of videos as files: figures as JSON and as a table, and the rows as CSV."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sam3_jax.data.records import Problems
from sam3_jax.evaluation.tables import markdown, number, write_csv, write_json
from sam3_jax.evaluation.video import davis
from sam3_jax.evaluation.video.davis import ObjectScore
from sam3_jax.evaluation.video.measure import (
    VideoEvaluation,
    pair_rows,
    phrase_rows,
    video_rows,
)
from sam3_jax.evaluation.video.records import VideoDataset, VideoPredictions

SCHEMA_VERSION = 1
HOTA_PARTS = ("DetA", "AssA", "LocA")


def write_track_report(
    output: Path,
    dataset: VideoDataset,
    predictions: VideoPredictions,
    evaluation: VideoEvaluation,
    info: dict[str, Any],
) -> str:
    """Writes ``metrics.json``, ``metrics.md``, ``pairs.csv``, ``videos.csv`` and ``phrases.csv``.

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
    figures, phota = evaluation.cgf1(), evaluation.phota()
    data = {
        "schema_version": SCHEMA_VERSION,
        "info": info,
        "ground_truth": [dataset.source],
        "layout": dataset.layout,
        "score_threshold": evaluation.threshold,
        "pairs": len(evaluation.pairs),
        "videos": len(dataset.videos),
        "metrics": evaluation.metrics(),
        "by_IoU_threshold": {
            "cgF1": _lists({**figures._asdict(), "cgf1": figures.cgf1}),
            "pHOTA": _lists(phota._asdict()),
        },
        "problems": {
            "ground_truth": dataset.problems.found,
            "predictions": predictions.problems.found,
            "notes": predictions.notes,
        },
    }
    write_json(output / "metrics.json", data)
    table = format_tracks(dataset, evaluation)
    (output / "metrics.md").write_text(table + "\n", encoding="utf-8")
    write_csv(output / "pairs.csv", pair_rows(dataset, evaluation))
    write_csv(output / "videos.csv", video_rows(dataset, evaluation))
    write_csv(output / "phrases.csv", phrase_rows(dataset, evaluation))
    return table


def format_tracks(dataset: VideoDataset, evaluation: VideoEvaluation) -> str:
    """The figures in percent as Markdown."""
    metrics, figures = evaluation.metrics(), evaluation.cgf1()
    rows = [["", "masks"]]
    for title, name in (
        ("cgF1 (mask volumes)", "cgF1"),
        ("  pmF1", "positive_micro_F1"),
        ("  IL_MCC (-1 to 1)", "IL_MCC"),
        ("cgF1 at IoU .50", "cgF1@0.5"),
        ("cgF1 at IoU .75", "cgF1@0.75"),
        ("pHOTA (phrases)", "pHOTA"),
        *((f"  {part}", f"p{part}") for part in HOTA_PARTS),
        ("HOTA (mean of categories)", "HOTA"),
        *((f"  {part}", part) for part in HOTA_PARTS),
        ("TETA", "TETA"),
        ("  LocA", "TETA_LocA"),
        ("  AssocA", "TETA_AssocA"),
        ("  ClsA", "TETA_ClsA"),
    ):
        scale = 1 if name == "IL_MCC" else 100
        rows.append([title, number(scale * metrics.get(name, float("nan")))])
    foot = (
        f"{figures.pairs} video-phrase pairs of {len(dataset.videos)} videos: "
        f"{figures.il_tp + figures.il_fn} with targets ({figures.il_fn} missed altogether), "
        f"{figures.il_fp + figures.il_tn} without ({figures.il_fp} with something predicted)"
    )
    return f"{markdown(rows)}\n\n{foot}"


def write_davis_report(
    output: Path,
    scores: Sequence[ObjectScore],
    problems: Problems,
    notes: Sequence[str],
    info: dict[str, Any],
) -> str:
    """Writes ``metrics.json``, ``metrics.md``, ``objects.csv`` and ``sequences.csv``.

    Args:
      output: an existing folder.
      scores: of all objects.
      problems: of the files.
      notes: what a reader of the figures should know.
      info: facts about the run, for the JSON.

    Returns:
      the table, for the terminal.

    Raises:
      OSError: when a file cannot be written.
    """
    metrics = davis.summary(scores)
    objects = [_object_row(score) for score in scores]
    groups = collections.defaultdict(list)
    for row in objects:
        groups[row["sequence"]].append(row)
    sequences = [_sequence_row(name, group) for name, group in groups.items()]
    problem = {"files": problems.found, "notes": list(notes)}
    counts = {"sequences": len(sequences), "objects": len(objects)}
    data = {"schema_version": SCHEMA_VERSION, "info": info, "layout": "davis", **counts}
    write_json(output / "metrics.json", data | {"metrics": metrics, "problems": problem})
    names = {"J&F": "J&F", "J": "  J", "F": "  F"}
    rows = [["", "mean", "recall", "decay"]]
    for name, title in names.items():
        parts = (metrics.get(f"{name}{part}", float("nan")) for part in ("", "_recall", "_decay"))
        rows.append([title, *(number(100 * value) for value in parts)])
    foot = f"{len(objects)} objects of {len(sequences)} sequences, first and last frames excluded"
    table = f"{markdown(rows)}\n\n{foot}"
    (output / "metrics.md").write_text(table + "\n", encoding="utf-8")
    write_csv(output / "objects.csv", objects)
    write_csv(output / "sequences.csv", sequences)
    return table


def _object_row(score: ObjectScore) -> dict[str, Any]:
    parts = {"J": davis.statistics(score.j), "F": davis.statistics(score.f)}
    row: dict[str, Any] = {
        "sequence": score.sequence,
        "object": score.object_id,
        "frames": len(score.j),
        "J&F": (parts["J"].mean + parts["F"].mean) / 2,
    }
    for name, part in parts.items():
        row |= {name: part.mean, f"{name}_recall": part.recall, f"{name}_decay": part.decay}
    return row


def _sequence_row(name: str, objects: Sequence[dict[str, Any]]) -> dict[str, Any]:
    figures = list(objects[0])[3:]
    means = {figure: float(np.mean([row[figure] for row in objects])) for figure in figures}
    first = {"sequence": name, "objects": len(objects), "frames": objects[0]["frames"]}
    return first | means


def _lists(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v.tolist() if hasattr(v, "tolist") else v for k, v in values.items()}
