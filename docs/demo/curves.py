"""Draws the logs of training runs: ``python docs/demo/curves.py``. Needs matplotlib.

Reads every ``STAGE.jsonl`` here, writes ``curves.svg``. ``--take STAGE RUN`` first makes one
of the ``log.jsonl`` that ``train.py`` wrote: means over its parts, without what nobody draws.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HERE = Path(__file__).parent
# Stage: figures of its log that tell how it went.
STAGES = {
    "words": ("contrast", "named"),
    "scenes": ("contrast", "named"),
    "boxes": ("class", "presence", "giou"),
    "masks": ("class", "presence", "giou", "dice"),
    "regions": ("contrast", "named", "regions"),
    "all": ("class", "presence", "giou", "dice"),
    "regions2": ("contrast", "named", "regions"),
    "all2": ("class", "presence", "giou", "dice"),
    "pointing": ("click_first_iou",),
    "clicks": ("click_first_iou", "click_last_iou"),
    "near": ("tracked_iou",),
    "clips": ("prompted_iou", "tracked_iou", "last_iou"),
    "memory": ("prompted_iou", "tracked_iou", "last_iou"),
    "finer": ("class", "presence", "giou", "dice"),
    "last": ("prompted_iou", "tracked_iou", "last_iou"),
}
KEPT = ("kind", "step", "steps", "time", "step_s", "loss", "grad_norm", "rate")
ROWS = 2
POINTS = 100  # a log keeps the means of so many parts


def take(stage: str, run: Path) -> None:
    """Copies a run's log, averaged over parts of it."""
    entries = _read(run / "log.jsonl")
    names = (*KEPT, *STAGES[stage])
    size = -(-len(entries) // POINTS)
    with (HERE / f"{stage}.jsonl").open("w", encoding="utf-8") as file:
        for start in range(0, len(entries), size):
            part = entries[start : start + size]
            row = {name: part[-1][name] for name in names if name in part[-1]}
            for name in row.keys() & {"step_s", "loss", "grad_norm", *STAGES[stage]}:
                # No step time is known of a line that only compiled, after a resume.
                known = [entry[name] for entry in part if entry[name] is not None]
                row[name] = float(f"{sum(known) / len(known):.4g}") if known else None
            file.write(json.dumps(row) + "\n")


def draw() -> None:
    """All logs that are here, side by side."""
    import matplotlib.pyplot as plt

    stages = [stage for stage in STAGES if (HERE / f"{stage}.jsonl").is_file()]
    columns = -(-len(stages) // ROWS)
    size = (3.2 * columns, 2.8 * ROWS)
    figure, axes = plt.subplots(ROWS, columns, figsize=size, squeeze=False)
    for axis in axes.flat[len(stages) :]:
        axis.set_axis_off()
    for stage, axis in zip(stages, axes.flat, strict=False):
        entries = _read(HERE / f"{stage}.jsonl")
        steps = [entry["step"] for entry in entries]
        for name in STAGES[stage]:
            axis.plot(steps, [entry[name] for entry in entries], label=name, linewidth=1)
        axis.set_title(stage, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(HERE / "curves.svg", metadata={"Date": None})


def _read(path: Path) -> list[dict]:
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [entry for entry in entries if entry["kind"] == "train"]


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--take", nargs=2, metavar=("STAGE", "RUN"), help="copy a run's log first")
    args = parser.parse_args()
    if args.take:
        take(args.take[0], Path(args.take[1]))
    draw()


if __name__ == "__main__":
    main()
