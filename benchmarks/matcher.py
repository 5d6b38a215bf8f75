"""The two Hungarian matchers: scipy on the host against optax on the device.

A step solves batch x layers problems in one call; with the released decoder and one-to-many
queries a prompt is 11 problems (6 layers, and 5 auxiliary ones of the copies)::

    python benchmarks/matcher.py --json benchmarks/results/matcher.json
    python benchmarks/matcher.py --prompts 4 --targets 16 --targets 200

Times are medians of whole calls on jax's default device, transfers to the host included. The
predictions are random boxes around the targets, as a half trained model makes them; the more
targets look alike, the longer an assignment takes.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam3_jax.ops.matcher import METHODS, hungarian, match_cost

QUERIES = 200
LAYERS = 11
COLUMNS = "prompts problems targets host_ms device_ms host_over_device".split()


def problem(prompts: int, targets: int) -> tuple[jax.Array, jax.Array]:
    """Costs (prompts, layers, queries, targets) and the mask of valid targets, all of them."""
    rng = np.random.default_rng(0)
    shape = (prompts, LAYERS)
    goal = rng.uniform(0.2, 0.8, (*shape, targets, 4)) * [1, 1, 0.3, 0.3]
    pick = rng.integers(0, targets, (*shape, QUERIES, 1))
    boxes = np.take_along_axis(goal, pick, axis=2) * rng.normal(1, 0.1, (*shape, QUERIES, 4))
    logits = rng.normal(-3, 2, (*shape, QUERIES))
    cost = jax.jit(match_cost)(*(jnp.asarray(x, jnp.float32) for x in (logits, boxes, goal)))
    return jax.block_until_ready(cost), jnp.ones((*shape, targets), bool)


def milliseconds(cost: jax.Array, valid: jax.Array, method: str, repeats: int) -> float:
    """Median time of a call, after one that compiles.

    Raises:
      RuntimeError: where the result is not an assignment.
    """
    solve = jax.jit(functools.partial(hungarian, method=method))
    if not solve(cost, valid).ok.all():
        raise RuntimeError(f"the {method} matcher failed")
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(solve(cost, valid))
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(prompts: int, targets: int, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    cost, valid = problem(prompts, targets)
    row = {"prompts": prompts, "problems": prompts * LAYERS, "targets": targets}
    for method in METHODS:
        row[f"{method}_ms"] = milliseconds(cost, valid, method, repeats)
    return row | {"host_over_device": row["host_ms"] / row["device_ms"]}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of all rows."""

    def cell(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell(row[name]) for name in COLUMNS) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", action="append", type=int, help="default 1, 4, 16")
    parser.add_argument("--targets", action="append", type=int, help="default 4, 16, 64, 200")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls (median)")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    device = jax.devices()[0]
    result: dict[str, Any] = {
        "schema_version": 1,
        "device": device.device_kind,
        "cores": os.cpu_count(),
        "queries": QUERIES,
        "rows": [],
    }
    for prompts in args.prompts or (1, 4, 16):
        for targets in args.targets or (4, 16, 64, 200):
            result["rows"].append(measure(prompts, targets, args.repeats))
    print(table(result["rows"]))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
