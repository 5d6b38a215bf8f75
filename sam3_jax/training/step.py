"""One training step of the detector (upstream ``sam3/train/trainer.py``): a pure function.

Parameters, moments and averages are float32; the model computes in ``StepConfig.dtype``. What is
done with the loss is in ``update.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from sam3_jax.config import ModelConfig
from sam3_jax.models.detector import Sam3
from sam3_jax.sharding import constrain_batch
from sam3_jax.training.batch import TrainBatch, micro_batches, normalize, prompts_per_image
from sam3_jax.training.clicks import ClickConfig, click_loss
from sam3_jax.training.contrast import ContrastConfig, contrast_losses
from sam3_jax.training.criterion import detection_loss
from sam3_jax.training.optimizer import IMAGE_MODEL, MEMORY, TRACKER, Optimizer
from sam3_jax.training.state import TrainState, assemble, trainable
from sam3_jax.training.targets import LossConfig
from sam3_jax.training.update import Metrics, check_reached, learn
from sam3_jax.types import ClickOutput, ClickPrompt, GroundOutput, Levels, TextFeatures

Step = Callable[[TrainState, TrainBatch], tuple[TrainState, Metrics]]


@dataclass
class StepConfig:
    """How a step computes.

    ``images_per_replica``: images that one process of the recipe would hold (released: 1). The loss
    is normalised by it (``replicas`` of ``detection_loss``), so that it depends on no mesh.
    """

    dtype: str = "bfloat16"
    matcher: str = "host"  # or "device"
    accumulate: int = 1  # micro-batches
    images_per_replica: int = 1
    seed: int = 0  # of dropout, of points and pairs of the mask losses


def unused_parameters(loss: LossConfig, clicks: ClickConfig) -> tuple[str, ...]:
    """Paths (patterns) that the losses do not reach, to be frozen; see ``optimizer.TRACKER``."""
    if clicks.weight and clicks.alone:
        return (*IMAGE_MODEL, *MEMORY)
    tracker = MEMORY if clicks.weight else TRACKER
    if not (loss.masks or loss.semantic):  # they alone read the finer levels
        return (*tracker, r"^segmentation/", r"^vision/detector_neck/level_[01]_")
    if not loss.masks:
        return (*tracker, r"^segmentation/(instance|mask_head)/")
    return tracker if loss.semantic else (*tracker, r"^segmentation/semantic/")


def make_train_step(
    model: ModelConfig,
    loss: LossConfig,
    optimizer: Optimizer,
    config: StepConfig,
    *,
    clicks: ClickConfig | None = None,
    contrast: ContrastConfig | None = None,
    alpha: float = 0.0,
) -> Step:
    """The jitted step: (state, batch) -> (state, metrics). It takes the state's memory over.

    Call it, or lower it, under ``jax.set_mesh(mesh)`` where there is one: the state is held to the
    rule of ``sam3_jax/sharding.py``, the batch split over the batch axes.

    A step whose loss or gradient is not finite changes nothing but the counters. ``metrics`` are
    the loss, its terms, ``grad_norm`` (before clipping), ``rate`` (the schedule's factor),
    ``skipped`` and ``skipped_in_a_row``.

    Args:
      clicks: training of the interactive head; None: it does not train.
      contrast: its losses besides, where ``contrast.along`` is not 0. Prompts with boxes are left
        out of them: what their phrase says may name nothing ("visual").
      alpha: of LoRA, where the state has it.

    Raises:
      ValueError: at the first call, where parameters would train that the loss does not reach, or
        where the batch does not fit.
    """
    clicks, contrast = clicks or ClickConfig(), contrast or ContrastConfig()

    def step(state: TrainState, batch: TrainBatch) -> tuple[TrainState, Metrics]:
        batch = constrain_batch(batch)
        train, frozen = trainable(state, optimizer)
        check_reached(train, unused_parameters(loss, clicks))

        def losses(train: dict, batch: TrainBatch, key: PRNGKeyArray) -> tuple[Array, Metrics]:
            params = assemble(train, frozen, lora=state.lora is not None, alpha=alpha)
            dropout, draw, user = jax.random.split(key, 3)
            module = Sam3(model, jnp.dtype(config.dtype))
            interactive = clicks.weight > 0
            alone = interactive and clicks.alone
            got = forward(module, params, batch, dropout, detector=not alone, tracker=interactive)
            replicas = max(1, len(batch.images) // config.images_per_replica)
            total, terms = jnp.float32(0), {}
            if got.detector is not None:
                total, terms = detection_loss(
                    got.detector,
                    batch.targets,
                    loss,
                    matcher=config.matcher,
                    replicas=replicas,
                    key=draw,
                )
                if contrast.along:
                    spoken = batch.targets.prompt_valid & ~batch.geometry.box_mask.any(-1)
                    targets = batch.targets._replace(prompt_valid=spoken)
                    more, named = contrast_losses(
                        got.levels, got.text, batch.tokens, targets, contrast
                    )
                    total, terms = total + contrast.along * more, terms | named
            if got.tracker is None:
                return total, terms

            def click(prompt: ClickPrompt) -> ClickOutput:
                return module.apply({"params": params}, got.tracker, prompt, None, method="click")

            more, click_terms = click_loss(
                click,
                batch.clicks,
                clicks,
                user,
                frame=model.image_size,
                mask_side=4 * (model.image_size // model.vision.patch_size),
                replicas=replicas,
            )
            return total + clicks.weight * more, terms | click_terms

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


class Forward(NamedTuple):
    """What :func:`forward` computed: ``detector`` of each prompt, ``tracker`` of each object."""

    detector: GroundOutput | None
    tracker: Levels | None
    levels: Levels  # the detector's, of each image
    text: TextFeatures | None


def forward(
    module: Sam3,
    params: dict,
    batch: TrainBatch,
    key: PRNGKeyArray,
    *,
    detector: bool = True,
    tracker: bool = False,
) -> Forward:
    """The detector as it trains: with dropout, drop path and one-to-many queries.

    Besides, with ``tracker``, the interactive head's pyramids of each object to click on.
    """
    prompts = prompts_per_image(batch)

    def for_each(levels: Levels, count: int) -> Levels:
        # Repeating, unlike indexing, needs nothing from other devices.
        return tuple(jnp.repeat(level, count, axis=0) for level in levels)

    def run(module: Sam3) -> Forward:
        pixels = normalize(batch.images)
        image = module.encode_image(pixels, tracker=tracker, deterministic=False)
        out = text = None
        if detector:
            text = module.encode_text(batch.tokens)
            levels = for_each(image.detector, prompts)
            out = module.ground(
                levels, text, batch.geometry, None, None, dac=True, deterministic=False
            )
        objects = batch.clicks.valid.shape[1]
        pyramids = for_each(image.tracker, objects) if tracker else None
        return Forward(out, pyramids, image.detector, text)

    return module.apply({"params": params}, rngs={"dropout": key}, method=run)
