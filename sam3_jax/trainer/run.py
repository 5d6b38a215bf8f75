"""What the parts of a training run share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from sam3_jax.trainer.checkpoints import RunCheckpoints
from sam3_jax.trainer.config import TrainConfig
from sam3_jax.trainer.logs import RunLog
from sam3_jax.trainer.start import Origin
from sam3_jax.trainer.tasks import Judge, Task
from sam3_jax.training.optimizer import Optimizer


class Run(NamedTuple):
    """What stays the same from step to step."""

    config: TrainConfig
    task: Task
    output: Path
    mesh: Mesh | None
    origin: Origin
    optimizer: Optimizer
    step: Callable  # (state, batch) -> (state, metrics)
    position: dict[str, Any]
    log: RunLog
    checkpoints: RunCheckpoints
    validator: Judge | None
