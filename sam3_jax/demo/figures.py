"""What the demo's model has learned: ``python -m sam3_jax.demo.figures CHECKPOINT DATA``.

The held-out sets, and the goals, were fixed before the first training run. What is asked, and how,
is in :mod:`sam3_jax.demo.asking`; masks, scores and cgF1 are those of ``evaluate.py``.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sam3_jax.checkpoint import CheckpointError
from sam3_jax.data.annotations import load_annotations
from sam3_jax.data.images import ImageError
from sam3_jax.data.records import AnnotationError, Dataset, Instance, Key, Problems
from sam3_jax.demo.asking import Answers, ask, by_picture, distinct, exemplar_pairs
from sam3_jax.demo.held_out import DIGESTS, FILE, digest_of
from sam3_jax.evaluation.cgf1 import accumulate, score_records
from sam3_jax.evaluation.predictions import Predictions
from sam3_jax.evaluation.tables import markdown, write_json
from sam3_jax.inference.image import ImagePredictor

SCHEMA_VERSION = 1
SETS = ("test", "unseen")
OBJECTS = 300  # that are clicked on
DESCRIPTION = """\
Measures a checkpoint on the demo's held-out sets, which python -m sam3_jax.demo.dataset DATA writes
(with --train 0 they alone): phrases, colours with shapes that training never showed together, one
exemplar box instead of the phrase, and clicks. "Distinct" are the same answers without duplicates,
as infer.py --nms iou --nms-threshold 0.3 gives them.
"""


class Goal(NamedTuple):
    """One line of the table."""

    title: str
    kind: str  # of figures
    name: str
    scale: int  # 100: printed in percent
    least: float | None  # as printed; None: no goal


GOALS = (
    Goal("text: mask cgF1", "text", "cgF1", 100, 75),
    Goal("text: mask cgF1, distinct", "text", "cgF1_distinct", 100, None),
    Goal("text: pmF1", "text", "pmF1", 100, None),
    Goal("text: IL_MCC", "text", "IL_MCC", 1, 0.9),
    Goal("text, unseen pairs: mask cgF1", "unseen", "cgF1", 100, 55),
    Goal("text, unseen pairs: mask cgF1, distinct", "unseen", "cgF1_distinct", 100, None),
    Goal("text, unseen pairs: pmF1", "unseen", "pmF1", 100, None),
    Goal("text, unseen pairs: IL_MCC", "unseen", "IL_MCC", 1, None),
    Goal("one exemplar box: mask cgF1", "exemplar", "cgF1", 100, 60),
    Goal("one exemplar box: mask cgF1, distinct", "exemplar", "cgF1_distinct", 100, None),
    Goal("one exemplar box: pmF1", "exemplar", "pmF1", 100, None),
    Goal("1 click: mean IoU", "clicks", "mIoU_1", 1, 0.85),
    Goal("2 clicks: mean IoU", "clicks", "mIoU_2", 1, None),
    Goal("3 clicks: mean IoU", "clicks", "mIoU_3", 1, 0.9),
)
Values = dict[str, float | int]  # fractions and counts
Figures = dict[str, Values]  # by kind


def measure_demo(predictor: ImagePredictor, data: Path, *, limit: int = 0) -> Figures:
    """All figures, as fractions, with the numbers of what they are of.

    Args:
      predictor: its image is replaced.
      data: folder of ``test`` and ``unseen``.
      limit: only so many pictures of each set, and clicks; 0: all.

    Raises:
      AnnotationError, ImageError, OSError: when the sets cannot be read.
    """
    figures: Figures = {}
    for split in SETS:
        dataset = read_set(data, split, limit)
        first = split == SETS[0]
        objects = min(OBJECTS, limit or OBJECTS) if first else 0
        answers = ask(predictor, dataset, data / split, exemplars=first, objects=objects)
        figures |= figures_of(dataset, answers) if first else {split: _cgf1(dataset, answers.text)}
    return figures


def read_set(data: Path, split: str, limit: int = 0) -> Dataset:
    """The pairs of a held-out set, or those of its first ``limit`` pictures.

    Raises:
      AnnotationError: it is not there, or cannot be read.
    """
    file = data / split / FILE
    if not file.is_file():
        raise AnnotationError(
            f"{file}: no such file; python -m sam3_jax.demo.dataset {data} --train 0 makes it"
        )
    dataset = load_annotations([file])
    if not limit:
        return dataset
    chosen = set(list(by_picture(dataset))[:limit])
    return dataset._replace(records=[r for r in dataset.records if r.file_name in chosen])


def figures_of(dataset: Dataset, answers: Answers) -> Figures:
    """Figures of the test set: by text, by exemplar, by clicks."""
    pairs = exemplar_pairs(dataset.records)
    by_box = {r.key: answers.exemplar.get(r.key, answers.text.get(r.key, [])) for r in pairs}
    ious = np.array(answers.clicks)
    return {
        "text": _cgf1(dataset, answers.text),
        "exemplar": _cgf1(dataset._replace(records=pairs), by_box),
        "clicks": {"objects": len(ious)}
        | {f"mIoU_{i}": float(mean) for i, mean in enumerate(ious.mean(0) if len(ious) else (), 1)},
    }


def _cgf1(dataset: Dataset, found: dict[Key, list[Instance]]) -> Values:
    figures, apart = (
        accumulate(
            score_records(dataset, Predictions(x, {}, True, Problems(), []), "segm").values()
        )
        for x in (found, distinct(found))
    )
    return {
        "pictures": len(by_picture(dataset)),
        "pairs": figures.pairs,
        "positive_pairs": figures.il_tp + figures.il_fn,
        "cgF1": float(figures.cgf1.mean()),
        "pmF1": float(figures.pmf1.mean()),
        "IL_MCC": figures.il_mcc,
        "cgF1_distinct": float(apart.cgf1.mean()),
        "pmF1_distinct": float(apart.pmf1.mean()),
    }


def table_of(figures: Figures) -> str:
    """The figures beside their goals."""
    rows = [["", "measured", "goal", ""]]
    for goal in GOALS:
        value = goal.scale * figures[goal.kind].get(goal.name, math.nan)
        text = "-" if math.isnan(value) else f"{value:.1f}" if goal.scale > 1 else f"{value:.3f}"
        if goal.least is None:
            rows.append([goal.title, text, "", ""])
        else:
            verdict = "reached" if value >= goal.least else "missed"
            rows.append([goal.title, text, f"{goal.least:g}", verdict])
    return markdown(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = _parser().parse_args(argv)
    try:
        predictor = ImagePredictor.from_pretrained(args.checkpoint)
        start = time.monotonic()
        figures = measure_demo(predictor, args.data, limit=args.limit)
        published = {split: _is_published(args.data, split) for split in SETS}
    except (AnnotationError, CheckpointError, ImageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table_of(figures))
    text, box, clicks = (figures[kind] for kind in ("text", "exemplar", "clicks"))
    print(
        f"\n{text['pictures']} pictures with {text['pairs']} pairs and "
        f"{figures['unseen']['pictures']} with {figures['unseen']['pairs']}; "
        f"{box['positive_pairs']} exemplars, {clicks['objects']} objects clicked on"
        + ("; a part of the sets" if args.limit else "")
    )
    for split in SETS:
        if not published[split]:
            print(f"warning: {args.data / split} is not the published set", file=sys.stderr)
    if args.output is not None:
        info = {
            "checkpoint": args.checkpoint,
            "dtype": predictor.dtype.name,
            "limit": args.limit,
            "published_sets": published,
            "seconds": round(time.monotonic() - start, 1),
        }
        return _write(args.output, {"info": info, "figures": figures})
    return 0


def _is_published(data: Path, split: str) -> bool:
    return digest_of((data / split / FILE).read_text(encoding="utf-8")) == DIGESTS[split]


def _write(path: Path, content: dict[str, Any]) -> int:
    goals: Figures = {}
    for goal in GOALS:
        if goal.least is not None:
            goals.setdefault(goal.kind, {})[goal.name] = goal.least / goal.scale
    try:
        write_json(path, {"schema_version": SCHEMA_VERSION, **content, "goals": goals})
    except OSError as error:
        print(f"error: cannot write the figures: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sam3_jax.demo.figures",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="folder of a run's model")
    add("data", metavar="DATA", type=Path, help="folder of the held-out sets")
    add("--limit", type=int, default=0, metavar="N", help="only so many pictures of each set")
    add("--output", type=Path, metavar="FILE", help="write the figures as JSON, fractions")
    return parser


if __name__ == "__main__":
    sys.exit(main())
