"""One training step of trunk and text encoder by contrast: a pure function."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from sam3_jax.config import ModelConfig
from sam3_jax.models.detector import Sam3
from sam3_jax.sharding import constrain_batch
from sam3_jax.training.batch import TrainBatch, micro_batches, normalize, prompts_per_image
from sam3_jax.training.contrast import ContrastConfig, contrast_losses, unused_by_contrast
from sam3_jax.training.optimizer import Optimizer
from sam3_jax.training.state import TrainState, assemble, trainable
from sam3_jax.training.step import Step, StepConfig
from sam3_jax.training.update import Metrics, check_reached, learn
from sam3_jax.types import Levels, TextFeatures


def make_contrast_step(
    model: ModelConfig, contrast: ContrastConfig, optimizer: Optimizer, config: StepConfig
) -> Step:
    """The jitted step: (state, batch) -> (state, metrics); see ``make_train_step``.

    Raises:
      ValueError: at the first call, where parameters would train that the loss does not reach,
        where the state has LoRA, or where the batch has no masks.
    """

    def step(state: TrainState, batch: TrainBatch) -> tuple[TrainState, Metrics]:
        if state.lora is not None:
            raise ValueError("contrast starts a model from random values: it has no use for LoRA")
        if not batch.targets.masks.size:
            raise ValueError("contrast finds objects by their masks: give data.example.mask_size")
        batch = constrain_batch(batch)
        train, frozen = trainable(state, optimizer)
        check_reached(train, unused_by_contrast(contrast))

        def losses(train: dict, batch: TrainBatch, key: PRNGKeyArray) -> tuple[Array, Metrics]:
            prompts_per_image(batch)
            module = Sam3(model, jnp.dtype(config.dtype))

            def run(module: Sam3) -> tuple[Levels, TextFeatures]:
                pixels = normalize(batch.images)
                image = module.encode_image(pixels, tracker=False, deterministic=False)
                return image.detector, module.encode_text(batch.tokens)

            levels, text = module.apply(
                {"params": assemble(train, frozen, lora=False, alpha=0.0)},
                rngs={"dropout": key},
                method=run,
            )
            return contrast_losses(levels, text, batch.tokens, batch.targets, contrast)

        return learn(
            state,
            batch,
            losses,
            micro_batches,
            optimizer,
            seed=config.seed,
            accumulate=config.accumulate,
        )

    return jax.jit(step, donate_argnums=0)
