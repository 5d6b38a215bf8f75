"""State of a training run: everything that a step reads and writes, and that a resume needs."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from sam3_jax.sharding import on_one_device, param_shardings
from sam3_jax.training import lora as lora_lib
from sam3_jax.training.optimizer import Optimizer, join, split


class TrainState(NamedTuple):
    """All arrays float32 or int32; trees are nested dictionaries by parameter path.

    ``step`` counts batches, skipped ones too, and gives the random numbers; the schedule counts
    updates (in ``opt_state``). ``lora`` is None where the parameters themselves train.
    ``opt_state`` and ``ema`` (None: no average) cover what trains only.
    """

    step: Int[Array, ""]
    params: dict
    lora: dict | None
    opt_state: optax.OptState
    ema: dict | None
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]


def trainable(state: TrainState, optimizer: Optimizer) -> tuple[dict, dict]:
    """(What trains, what does not): the LoRA tree and all parameters, or a split of the latter."""
    if state.lora is not None:
        return state.lora, state.params
    return split(state.params, optimizer.frozen)


def init_state(
    params: dict, optimizer: Optimizer, *, lora: dict | None = None, mesh: Mesh | None = None
) -> TrainState:
    """State before the first step, spread over ``mesh`` by the rule of ``sam3_jax/sharding.py``.

    ``params`` that are there already are not copied: the first step, which is given the state for
    its own use, takes them away.

    Raises:
      ValueError: where nothing trains, or a parameter is not in exactly one group.
    """

    # Every leaf has a definite place, as the step's results will have: or it compiles twice.
    place = functools.partial(param_shardings, mesh=mesh) if mesh else on_one_device
    params = jax.device_put(params, place(params))
    lora = None if lora is None else jax.device_put(lora, place(lora))

    def rest(train: dict) -> tuple:
        zero = jnp.int32(0)
        ema = jax.tree.map(jnp.copy, train) if optimizer.ema else None
        return optimizer.transform.init(train), ema, (zero, zero, zero)

    train = lora if lora is not None else split(params, optimizer.frozen)[0]
    if not jax.tree.leaves(train):
        raise ValueError(f"all parameters are frozen by {', '.join(optimizer.frozen)}")
    places = place(jax.eval_shape(rest, train))
    opt_state, ema, (step, skipped, in_a_row) = jax.jit(rest, out_shardings=places)(train)
    return TrainState(step, params, lora, opt_state, ema, skipped, in_a_row)


def export_params(
    state: TrainState, optimizer: Optimizer, *, alpha: float = 0.0, ema: bool = False
) -> dict:
    """Parameters for inference: the average's if ``ema``, LoRA (scaled by ``alpha``) merged.

    Raises:
      ValueError: where there is no average.
    """
    train, frozen = trainable(state, optimizer)
    if ema:
        if state.ema is None:
            raise ValueError("the state has no average of its parameters: train with an ema decay")
        train = state.ema
    return assemble(train, frozen, lora=state.lora is not None, alpha=alpha)


def assemble(train: dict, frozen: dict, *, lora: bool, alpha: float) -> dict:
    """All parameters, from the two halves of :func:`trainable`."""
    return lora_lib.merge(frozen, train, alpha) if lora else join(train, frozen)
