"""One training step of the detector (upstream ``sam3/train/trainer.py``): a pure function.

Parameters, moments and averages are float32; the model computes in ``StepConfig.dtype``.

Gradients are accumulated by a scan over micro-batches inside the step, not by ``optax.MultiSteps``:
there is one update, one decision to skip and one state a step, nothing that waits between calls has
to be saved, and the scan's carry is the only extra copy of the gradients. As upstream, every
micro-batch normalises its own losses, and their gradients are averaged: that equals one large batch
where the micro-batches have as many targets each.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from sam3_jax.config import ModelConfig
from sam3_jax.models.detector import Sam3
from sam3_jax.sharding import constrain_batch, constrain_params
from sam3_jax.training.batch import TrainBatch, micro_batches, normalize, prompts_per_image
from sam3_jax.training.clicks import ClickConfig, click_loss
from sam3_jax.training.criterion import detection_loss
from sam3_jax.training.optimizer import MEMORY, TRACKER, Optimizer, path_of
from sam3_jax.training.state import TrainState, assemble, trainable
from sam3_jax.training.targets import LossConfig
from sam3_jax.types import ClickOutput, ClickPrompt, GroundOutput, Levels

Metrics = dict[str, Float[Array, ""]]
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
    tracker = MEMORY if clicks.weight else TRACKER
    if not (loss.masks or loss.semantic):
        return (*tracker, r"^segmentation/")
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
      alpha: of LoRA, where the state has it.

    Raises:
      ValueError: at the first call, where parameters would train that the loss does not reach, or
        where the batch does not fit.
    """
    clicks = clicks or ClickConfig()

    def step(state: TrainState, batch: TrainBatch) -> tuple[TrainState, Metrics]:
        batch = constrain_batch(batch)
        train, frozen = trainable(state, optimizer)
        _check_reached(train, loss, clicks)
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)

        def losses(train: dict, batch: TrainBatch, key: PRNGKeyArray) -> tuple[Array, Metrics]:
            params = assemble(train, frozen, lora=state.lora is not None, alpha=alpha)
            dropout, draw, user = jax.random.split(key, 3)
            module = Sam3(model, jnp.dtype(config.dtype))
            out, levels = forward(module, params, batch, dropout, tracker=clicks.weight > 0)
            replicas = max(1, len(batch.images) // config.images_per_replica)
            total, terms = detection_loss(
                out, batch.targets, loss, matcher=config.matcher, replicas=replicas, key=draw
            )
            if levels is None:
                return total, terms

            def click(prompt: ClickPrompt) -> ClickOutput:
                return module.apply({"params": params}, levels, prompt, None, method="click")

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

        grads, metrics = _accumulate(losses, train, batch, key, config.accumulate)
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "rate": optimizer.schedule(state.step - state.skipped),
        }
        state = _update(state, grads, metrics, optimizer)
        metrics |= {
            "skipped": state.skipped.astype(jnp.float32),
            "skipped_in_a_row": state.skipped_in_a_row.astype(jnp.float32),
        }
        return constrain_params(state), metrics

    return jax.jit(step, donate_argnums=0)


def _check_reached(train: dict, loss: LossConfig, clicks: ClickConfig) -> None:
    for path, _ in jax.tree_util.tree_flatten_with_path(train)[0]:
        for pattern in unused_parameters(loss, clicks):
            if re.search(pattern, path_of(path)):
                raise ValueError(
                    f"{path_of(path)} would train, but the loss does not reach it, so weight decay "
                    f"would wear it away: add {pattern!r} to the optimizer's freeze"
                )


def forward(
    module: Sam3, params: dict, batch: TrainBatch, key: PRNGKeyArray, *, tracker: bool = False
) -> tuple[GroundOutput, Levels | None]:
    """The detector as it trains: with dropout, drop path and one-to-many queries.

    Besides, with ``tracker``, the interactive head's pyramids of each object to click on.
    """
    prompts = prompts_per_image(batch)

    def for_each(levels: Levels, count: int) -> Levels:
        # Repeating, unlike indexing, needs nothing from other devices.
        return tuple(jnp.repeat(level, count, axis=0) for level in levels)

    def run(module: Sam3) -> tuple[GroundOutput, Levels | None]:
        pixels = normalize(batch.images)
        image = module.encode_image(pixels, tracker=tracker, deterministic=False)
        text = module.encode_text(batch.tokens)
        levels = for_each(image.detector, prompts)
        out = module.ground(levels, text, batch.geometry, None, None, dac=True, deterministic=False)
        objects = batch.clicks.valid.shape[1]
        return out, for_each(image.tracker, objects) if tracker else None

    return module.apply({"params": params}, rngs={"dropout": key}, method=run)


def _accumulate(
    losses: Callable, train: dict, batch: TrainBatch, key: PRNGKeyArray, count: int
) -> tuple[dict, Metrics]:
    """Mean gradients and metrics over ``count`` micro-batches."""
    gradient = jax.value_and_grad(losses, has_aux=True)

    def one(batch: TrainBatch, key: PRNGKeyArray) -> tuple[dict, Metrics]:
        (total, terms), grads = gradient(train, batch, key)
        return constrain_params(grads), {"loss": total, **terms}

    if count == 1:
        return one(batch, key)
    cut = micro_batches(batch, count)
    keys = jax.random.split(key, count)

    def add(sums: tuple, part: tuple) -> tuple[tuple, None]:
        batch, key = part
        return jax.tree.map(jnp.add, sums, one(constrain_batch(batch), key)), None

    first = jax.tree.map(lambda x: x[0], (cut, keys))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, *first))
    sums, _ = lax.scan(add, zeros, (cut, keys))
    return jax.tree.map(lambda x: x / count, sums)


def _update(state: TrainState, grads: dict, metrics: Metrics, optimizer: Optimizer) -> TrainState:
    """The state after the optimizer's step, or as it was where something is not finite.

    The old values are chosen element by element. With a conditional XLA computes the norm twice
    (for metrics and clip), and takes 8 GB more to compile for a TPU.
    """
    train, frozen = trainable(state, optimizer)
    updates = state.step - state.skipped
    change, opt_state = optimizer.transform.update(grads, state.opt_state, train)
    moved, ema = optax.apply_updates(train, change), state.ema
    if ema is not None:
        # A young average follows quickly, so that the initial values do not linger in it.
        decay = jnp.minimum(optimizer.ema, (1.0 + updates) / (10.0 + updates))
        ema = optax.incremental_update(moved, ema, 1.0 - decay)

    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    train, opt_state, ema = jax.tree.map(
        functools.partial(jnp.where, finite),
        (moved, opt_state, ema),
        (train, state.opt_state, state.ema),
    )
    if state.lora is None:
        params, lora = assemble(train, frozen, lora=False, alpha=0.0), None
    else:
        params, lora = state.params, train
    bad = (~finite).astype(jnp.int32)
    return TrainState(
        step=state.step + 1,
        params=params,
        lora=lora,
        opt_state=opt_state,
        ema=ema,
        skipped=state.skipped + bad,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * bad,
    )
