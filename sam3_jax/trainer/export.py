"""Models out of a run's states: for ``infer.py``, ``evaluate.py`` and the way back to torch."""

from __future__ import annotations

import contextlib
import sys

import jax
import numpy as np

from sam3_jax import checkpoint
from sam3_jax.trainer.run import Run
from sam3_jax.trainer.start import barrier
from sam3_jax.trainer.state_shapes import shape_of
from sam3_jax.training.state import TrainState, export_params

MODEL, BEST_MODEL = "model", "best_model"  # checkpoints in the output folder


def shipped_params(run: Run, state: TrainState) -> dict:
    """What would be shipped now: the average where there is one, LoRA merged."""
    average = state.ema is not None
    return export_params(state, run.optimizer, alpha=run.config.lora.alpha, ema=average)


def export_models(run: Run, state: TrainState) -> None:
    """Writes the last model and, where it is another one, the best."""
    last = int(state.step)
    _save_model(run, state, MODEL, last)
    best = run.checkpoints.best()
    if best not in (None, last):
        like = jax.tree.map(shape_of, state)
        jax.tree.map(lambda x: x.delete(), state)
        _save_model(run, run.checkpoints.restore(like, best)[0], BEST_MODEL, best)


def _save_model(run: Run, state: TrainState, name: str, step: int) -> None:
    with jax.set_mesh(run.mesh) if run.mesh else contextlib.nullcontext():
        params = jax.tree.map(_on_host, shipped_params(run, state))
    origin, folder = run.origin, run.output / name
    metadata = {**origin.metadata, "step": step, "run": str(run.output.absolute())}
    checkpoint.save(
        folder, params, origin.model, unused=origin.unused, metadata=metadata, overwrite=True
    )
    barrier(name)
    if jax.process_index() == 0:
        print(f"{name}: {folder} (step {step})", file=sys.stderr)


def _on_host(leaf: jax.Array) -> np.ndarray:
    if leaf.is_fully_addressable:
        return np.asarray(leaf)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(leaf, tiled=True)
