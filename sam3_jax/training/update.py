"""What every training step does with a loss: gradients over micro-batches, and one update.

Gradients are accumulated by a scan over micro-batches inside the step, not by ``optax.MultiSteps``:
there is one update, one decision to skip and one state a step, nothing that waits between calls has
to be saved, and the scan's carry is the only extra copy of the gradients. As upstream, every
micro-batch normalises its own losses, and their gradients are averaged: that equals one large batch
where the micro-batches have as many targets each.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from sam3_jax.sharding import constrain_batch, constrain_params
from sam3_jax.training.optimizer import Optimizer, path_of
from sam3_jax.training.state import TrainState, assemble, trainable

Metrics = dict[str, Float[Array, ""]]
Losses = Callable[[dict, Any, PRNGKeyArray], tuple[Array, Metrics]]


def learn(
    state: TrainState,
    batch: Any,
    losses: Losses,
    cut: Callable[[Any, int], Any],
    optimizer: Optimizer,
    *,
    seed: int,
    accumulate: int,
) -> tuple[TrainState, Metrics]:
    """The state after one batch, and its metrics.

    A step whose loss or gradient is not finite changes nothing but the counters. ``metrics`` are
    the loss, its terms, ``grad_norm`` (before clipping), ``rate`` (the schedule's factor),
    ``skipped`` and ``skipped_in_a_row``.

    Args:
      losses: of (what trains, a micro-batch, a key).
      cut: the batch with a new leading axis of so many micro-batches.
      accumulate: micro-batches.
    """
    train, _ = trainable(state, optimizer)
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    grads, metrics = _accumulate(losses, cut, train, batch, key, accumulate)
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


def check_reached(train: dict, unused: Sequence[str]) -> None:
    """Refuses a parameter that trains although the loss does not reach it.

    Args:
      unused: paths (patterns) that it does not reach.

    Raises:
      ValueError: naming the first such parameter.
    """
    for path, _ in jax.tree_util.tree_flatten_with_path(train)[0]:
        for pattern in unused:
            if re.search(pattern, path_of(path)):
                raise ValueError(
                    f"{path_of(path)} would train, but the loss does not reach it, so weight decay "
                    f"would wear it away: add {pattern!r} to the optimizer's freeze"
                )


def _accumulate(
    losses: Losses,
    cut: Callable[[Any, int], Any],
    train: dict,
    batch: Any,
    key: PRNGKeyArray,
    count: int,
) -> tuple[dict, Metrics]:
    """Mean gradients and metrics over ``count`` micro-batches."""
    gradient = jax.value_and_grad(losses, has_aux=True)

    def one(batch: Any, key: PRNGKeyArray) -> tuple[dict, Metrics]:
        (total, terms), grads = gradient(train, batch, key)
        return constrain_params(grads), {"loss": total, **terms}

    if count == 1:
        return one(batch, key)
    parts = cut(batch, count)
    keys = jax.random.split(key, count)

    def add(sums: tuple, part: tuple) -> tuple[tuple, None]:
        batch, key = part
        return jax.tree.map(jnp.add, sums, one(constrain_batch(batch), key)), None

    first = jax.tree.map(lambda x: x[0], (parts, keys))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, *first))
    sums, _ = lax.scan(add, zeros, (parts, keys))
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
