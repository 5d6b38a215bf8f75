"""One training step of the tracker, on clips: a pure function like ``step.py``'s of pictures."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from sam3_jax.config import ModelConfig
from sam3_jax.models.detector import Sam3
from sam3_jax.sharding import constrain_batch
from sam3_jax.training.clip_batch import ClipBatch, cut_clips
from sam3_jax.training.optimizer import IMAGE_MODEL, Optimizer
from sam3_jax.training.state import TrainState, assemble, trainable
from sam3_jax.training.step import StepConfig
from sam3_jax.training.tracker_clip import TrackerTrainingConfig, clip_loss
from sam3_jax.training.update import Metrics, check_reached, learn

ClipStep = Callable[[TrainState, ClipBatch], tuple[TrainState, Metrics]]


def unused_by_clips(config: TrackerTrainingConfig) -> tuple[str, ...]:
    """Paths (patterns) that the loss of clips does not reach, to be frozen."""
    prompting = config.prompting
    never = () if prompting.mask > 0 else (r"^tracker/mask_downsample/",)
    if prompting.mask >= 1:  # nobody clicks
        never = (r"^tracker/prompt_encoder/point_embed/", r"^tracker/no_memory_embed/")
    return (*IMAGE_MODEL, *never)


def make_clip_step(
    model: ModelConfig,
    tracker: TrackerTrainingConfig,
    optimizer: Optimizer,
    config: StepConfig,
    *,
    alpha: float = 0.0,
) -> ClipStep:
    """The jitted step: (state, batch) -> (state, metrics); see ``make_train_step``.

    Everything but the tracker and its neck is frozen: it has neither gradients nor moments.

    Args:
      alpha: of LoRA, where the state has it.

    Raises:
      ValueError: at the first call, where parameters would train that the loss does not reach, or
        where the batch does not fit.
    """

    def step(state: TrainState, batch: ClipBatch) -> tuple[TrainState, Metrics]:
        batch = constrain_batch(batch)
        train, frozen = trainable(state, optimizer)
        check_reached(train, unused_by_clips(tracker))

        def losses(train: dict, batch: ClipBatch, key: PRNGKeyArray) -> tuple[Array, Metrics]:
            params = assemble(train, frozen, lora=state.lora is not None, alpha=alpha)
            module = Sam3(model, jnp.dtype(config.dtype))
            replicas = max(1, len(batch.frames) // config.images_per_replica)
            return clip_loss(module, params, batch, tracker, key, replicas=replicas)

        return learn(
            state,
            batch,
            losses,
            cut_clips,
            optimizer,
            seed=config.seed,
            accumulate=config.accumulate,
        )

    return jax.jit(step, donate_argnums=0)
