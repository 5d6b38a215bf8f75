"""What the parts of a training run share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from sam3_jax.trainer.checkpoints import RunCheckpoints
from sam3_jax.trainer.config import TrainConfig
from sam3_jax.trainer.logs import RunLog
from sam3_jax.trainer.start import Origin
from sam3_jax.trainer.validation import Validator
from sam3_jax.training.optimizer import Optimizer
from sam3_jax.training.step import Step


class Run(NamedTuple):
    """What stays the same from step to step."""

    config: TrainConfig
    output: Path
    mesh: Mesh | None
    origin: Origin
    optimizer: Optimizer
    step: Step
    position: dict[str, Any]
    log: RunLog
    checkpoints: RunCheckpoints
    validator: Validator | None
