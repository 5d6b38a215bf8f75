"""A training run: state and data to the devices, step after step, and what happens between steps.

Everything random hangs on the seed and the number of the step, everything that a resume needs is in
the checkpoint of a step: a run that was interrupted goes on as if it had not been, bit for bit on
the same devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from sam3_jax import checkpoint
from sam3_jax.config import to_dict
from sam3_jax.data.pipeline import DataConfig
from sam3_jax.inference import compile_cache
from sam3_jax.sharding import batch_sharding
from sam3_jax.trainer.checkpoints import RunCheckpoints
from sam3_jax.trainer.config import TrainConfig
from sam3_jax.trainer.export import MODEL, export_models, shipped_params
from sam3_jax.trainer.interrupt import Interruption
from sam3_jax.trainer.logs import RunLog
from sam3_jax.trainer.resolve import make_run_mesh, with_steps
from sam3_jax.trainer.run import Run
from sam3_jax.trainer.start import Origin, RunError, initial
from sam3_jax.trainer.state_shapes import shape_of
from sam3_jax.trainer.tasks import Task, task_of
from sam3_jax.training.lora import add_lora
from sam3_jax.training.optimizer import Optimizer, make_optimizer
from sam3_jax.training.state import TrainState, init_state


class Finished(NamedTuple):
    """What came of a run."""

    step: int
    complete: bool  # False: interrupted, the same command goes on from here
    metrics: dict[str, float]  # of the last step
    figures: dict[str, float]  # of the last validation


def train(config: TrainConfig) -> Finished:
    """Trains until the last step, or until the machine is needed elsewhere; resumes by itself.

    Raises:
      RunError: a configuration that cannot run, or too many bad steps in a row.
      AnnotationError, CheckpointError: unusable files; the disk is full.
    """
    # -- Data: first, because it is where most mistakes are --------------------------------------
    compile_cache.enable()
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    task = task_of(config)
    folder = task.prepare()
    data = task.data(folder)
    config = with_steps(config, task.count(folder))

    # -- Model and state --------------------------------------------------------------------------
    mesh = make_run_mesh(config)
    origin = initial(config.init, config.model, task.resolution, config.seed, mesh)
    config = dataclasses.replace(config, model=origin.model)
    validator = task.judge(origin.model, output) if config.valid.annotations else None
    optimizer, state = _start(config, task, origin, mesh)
    step = task.step(origin.model, optimizer)

    # -- Where an earlier run of the same folder stopped ------------------------------------------
    checkpoints = RunCheckpoints(output / "states", config.checkpoint)
    position = {"batch_size": config.batch_size, "data_seed": data.seed, "data": folder.name}
    start = checkpoints.latest() or 0
    if start:
        state = _resume(checkpoints, state, position)
    _write_settings(config, output)

    # -- Steps ------------------------------------------------------------------------------------
    first = jax.process_index() == 0
    log = RunLog(
        output,
        config.log,
        steps=config.steps,
        start=start,
        images_per_step=config.batch_size,
        flops_per_step=task.flops(config, data) if first else None,
        active=first,
    )
    log.settings(to_dict(config))
    origin = origin._replace(params={})  # the state has them, the first step takes them over
    run = Run(
        config, task, output, mesh, origin, optimizer, step, position, log, checkpoints, validator
    )
    with contextlib.closing(log), contextlib.closing(checkpoints):
        return _steps(run, state, data, start)


def _steps(run: Run, state: TrainState, data: DataConfig, start: int) -> Finished:
    config, pending, figures = run.config, None, {}
    metrics: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        interruption = stack.enter_context(Interruption())
        if run.mesh:
            stack.enter_context(jax.set_mesh(run.mesh))
        batches = iter(run.task.batches(data, start))
        if hasattr(batches, "close"):
            stack.callback(batches.close)
        number = start
        while number < config.steps:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                raise RunError(
                    f"the data ended after {number} of {config.steps} steps: leave "
                    "data.epochs at 0, without end"
                ) from None
            waited = time.perf_counter() - asked
            with run.log.profile(number):
                state, now = run.step(state, place(batch, run.mesh))
            # Read one step late, so that the devices always have the next one.
            if pending:
                metrics = _report(run, *pending)
            number += 1
            pending = (number, now, waited)
            stop = interruption.asked(number)
            last = stop or number == config.steps
            judge = run.validator and not stop and (last or _due(number, config.validation.every))
            if last or judge:
                metrics, pending = _report(run, *pending), None
            better = False
            if judge:
                figures, better = _validate(run, state, number)
            if last or better or _due(number, config.checkpoint.every):
                with run.log.pause():
                    run.checkpoints.save(number, state, run.position, wait=last)
            if stop and number < config.steps:
                return Finished(number, False, metrics, figures)
    if start < config.steps or not checkpoint.is_checkpoint(run.output / MODEL):
        export_models(run, state)
    return Finished(number, True, metrics, figures)


def _due(number: int, every: int) -> bool:
    return every > 0 and number % every == 0


def _report(run: Run, number: int, metrics: dict[str, jax.Array], waited: float) -> dict:
    """Logs a step; stops a run that does not come back to finite numbers."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    run.log.step(number, values, waited=waited)
    bad, limit = int(values["skipped_in_a_row"]), run.config.max_skipped
    if bad > limit:
        last = run.checkpoints.latest()
        raise RunError(
            f"step {number}: loss or gradients were not finite {bad} times in a row, more than "
            f"max_skipped={limit}. The parameters are still those of step {number - bad}; the last "
            f"checkpoint is of step {last}. Lower optimizer.rate_scale, or look at the data "
            "(python -m sam3_jax.data.contact_sheet)"
        )
    return values


def place(batch: Any, mesh: Mesh | None) -> Any:
    """This process's rows of a batch onto its devices."""
    if mesh is None:
        return jax.device_put(batch)
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def _start(
    config: TrainConfig, task: Task, origin: Origin, mesh: Mesh | None
) -> tuple[Optimizer, TrainState]:
    """Optimizer and state before the first step."""
    frozen = (*config.optimizer.freeze, *task.unused)
    settings = dataclasses.replace(config.optimizer, freeze=frozen)
    try:
        optimizer = make_optimizer(settings, depth=origin.model.vision.depth, total=config.steps)
        lora = None
        if config.lora.rank:
            key = jax.random.fold_in(jax.random.key(config.seed), 1)
            lora = add_lora(origin.params, config.lora.patterns, config.lora.rank, key)
        return optimizer, init_state(origin.params, optimizer, lora=lora, mesh=mesh)
    except ValueError as error:
        raise RunError(str(error)) from error


def _resume(checkpoints: RunCheckpoints, state: TrainState, position: dict[str, Any]) -> TrainState:
    """The newest state of the folder, on today's devices."""
    like = jax.tree.map(shape_of, state)
    jax.tree.map(lambda x: x.delete(), state)
    restored, before = checkpoints.restore(like)
    for name, value in position.items():
        if before.get(name) != value:
            raise RunError(
                f"the run in this folder had {name}={before.get(name)!r}, now it is {value!r}: its "
                "data cannot go on where they stopped. Choose another output, or set it back"
            )
    print(f"resuming after step {int(restored.step)}", file=sys.stderr)
    return restored


def _validate(run: Run, state: TrainState, number: int) -> tuple[dict[str, float], bool]:
    """Figures of the state, and whether they are the best so far."""
    with run.log.pause():
        found = run.validator.run(shipped_params(run, state), number)
    run.log.figures(number, found.figures)
    for name, picture in found.pictures:
        run.log.picture(number, name, picture)
    return found.figures, run.checkpoints.record_best(number, found.figures)


def _write_settings(config: TrainConfig, output: Path) -> None:
    if jax.process_index() == 0:
        text = json.dumps(to_dict(config), indent=2, default=str)
        (output / "config.json").write_text(text + "\n")
