"""Makes the package's weights of a run's model: ``python -m sam3_jax.demo.bundle RUN/model``.

float16 on disk: its rounding (at most .05% of a value) is a quarter of bfloat16's or less, and the
values of a trained model lie far within its range. All 49408 rows of the vocabulary are kept, 6.3
of the 12 MB: words that training never showed have random rows, and the tokenizer needs no table of
its own.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sam3_jax import checkpoint
from sam3_jax.checkpoint import CheckpointError
from sam3_jax.checkpoint.tree import flatten, unflatten
from sam3_jax.config import ModelConfig, to_dict
from sam3_jax.demo.weights import FOLDER

DTYPE = np.float16
MOST = 20_000_000  # bytes that the package may ship
KEPT = ("source", "step")  # of the model's metadata: the rest names folders; the source's are cut
RUN_SETTINGS = "config.json"  # of a run, beside its model
COMMIT = Path("params/commit_success.txt")  # Orbax's, whose text names the folder it wrote to


def bundle(
    model: Path,
    target: Path,
    *,
    figures: Path | None = None,
    parts: Sequence[str] = (),
    average: Path | None = None,
    average_parts: Sequence[str] = (),
    average_share: float = 0.5,
) -> int:
    """Writes ``target``, a checkpoint in half precision; returns its size in bytes.

    Args:
      model: checkpoint of a run.
      target: replaced, if it is a checkpoint.
      figures: what ``python -m sam3_jax.demo.figures`` wrote about the model.
      parts: that are shipped; none: those that the model holds.
      average: another model of the same run of stages and of the same configuration.
      average_parts: that become the mean of both models; none: all that are shipped.
      average_share: of ``average`` in the mean, between 0 and 1.

    Raises:
      CheckpointError: no usable checkpoint; the other does not fit; values that half precision does
        not hold; too large.
      OSError, ValueError: unreadable figures; ``average_parts`` without ``average``; a wrong
        share.
    """
    if not 0 < average_share < 1:
        raise ValueError(f"--average-share must lie between 0 and 1, got {average_share}")
    if average_parts and average is None:
        raise ValueError("parts to average (--average-part), but no model that has them: --average")
    loaded = checkpoint.load(model, parts=list(parts) or None)
    _check_range(model, loaded.params)
    metadata = _origin(loaded.metadata) | _settings(model)
    if figures is not None:
        measured = json.loads(figures.read_text(encoding="utf-8"))
        metadata["figures"] = measured["figures"]
    params = loaded.params
    if average is not None:
        other = checkpoint.load(average, parts=list(average_parts or loaded.metadata["parts"]))
        _check_same(average, other.config, loaded.config)
        _check_range(average, other.params)
        params = _mean(params, other.params, average, average_share)
        facts = {"parts": other.metadata["parts"], "share": average_share}
        metadata["averaged"] = _origin(other.metadata) | facts
    checkpoint.save(
        target,
        params,
        loaded.config,
        metadata=metadata,
        parts=loaded.metadata["parts"],
        dtype=DTYPE,
        overwrite=True,
    )
    if (target / COMMIT).is_file():
        (target / COMMIT).write_text("Checkpoint commit was successful.")
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    if size > MOST:
        raise CheckpointError(f"{target}: {size} bytes, the package may ship {MOST}; ship less")
    return size


def _mean(params: dict, other: dict, source: Path, share: float = 0.5) -> dict:
    """``params``, with the mean of both wherever ``other`` has values."""
    values, others = flatten(params), flatten(other)
    for name, value in others.items():
        if name not in values:
            raise CheckpointError(
                f"{source}: {name} is missing in the model that is shipped; average parts that "
                "both have"
            )
        if values[name].shape != value.shape:
            raise CheckpointError(
                f"{source}: {name} has shape {value.shape}, in the model that is shipped it has "
                f"{values[name].shape}; average stages of one model"
            )
        values[name] = (1 - share) * values[name] + share * value
    return unflatten(values)


def _origin(metadata: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a model's metadata, without folders."""
    kept = {key: metadata[key] for key in KEPT if key in metadata}
    if "source" in kept:
        kept["source"] = re.sub(r"\S*/(?=\S)", "", kept["source"])
    return kept


def _settings(model: Path) -> dict[str, Any]:
    """What the run's own settings say about how the model came to be, where they are there."""
    file = model.parent / RUN_SETTINGS
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return {key: settings[key] for key in ("seed", "steps", "batch_size") if key in settings}


def _check_same(source: Path, config: ModelConfig, shipped: ModelConfig) -> None:
    found = list(_differences(to_dict(config), to_dict(shipped)))
    if found:
        raise CheckpointError(
            f"{source}: does not fit the model that is shipped: {', '.join(found)}; average models "
            "of one configuration"
        )


def _differences(values: dict, others: dict, where: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _differences(value, others[name], f"{where}{name}.")
        elif value != others[name]:
            yield f"{where}{name} is {value}, not {others[name]}"


def _check_range(model: Path, params: dict) -> None:
    largest = np.finfo(DTYPE).max
    for name, value in flatten(params).items():
        if not (np.abs(value) <= largest).all():  # nan too
            raise CheckpointError(
                f"{model}: {name} has values that are not finite or beyond {largest:.0f}, which "
                "half precision does not hold; train again"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sam3_jax.demo.bundle",
        description="Makes the weights that the package brings of a model that train.py wrote.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="RUN/model or RUN/best_model")
    add("--figures", metavar="FILE", type=Path, help="JSON of sam3_jax.demo.figures, to keep")
    add(
        "--part",
        nargs="+",
        default=[],
        choices=tuple(checkpoint.PARTS),
        help="what to ship: 'image clicks' leaves out the tracker's memory (default: all)",
    )
    add("--average", metavar="MODEL", type=Path, help="ship the mean of both models")
    add(
        "--average-part",
        nargs="+",
        default=[],
        choices=tuple(checkpoint.PARTS),
        help="of --average: 'image clicks' gives back what clicks lost in the tracker's training "
        "(default: what is shipped)",
    )
    add(
        "--average-share",
        metavar="S",
        type=float,
        default=0.5,
        help="of --average in the mean (default: %(default)s)",
    )
    add("--output", metavar="DIR", type=Path, default=FOLDER, help="(default: in the package)")
    args = parser.parse_args(argv)
    try:
        size = bundle(
            args.model,
            args.output,
            figures=args.figures,
            parts=args.part,
            average=args.average,
            average_parts=args.average_part,
            average_share=args.average_share,
        )
    except (CheckpointError, OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
