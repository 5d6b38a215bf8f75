"""The tracker's functions, jitted: one program each for a bucket's size, whatever happens in it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sam3_jax.config import ModelConfig
from sam3_jax.models.detector import Sam3
from sam3_jax.tracking import masks, state, step
from sam3_jax.tracking.config import TrackerConfig, check


class Programs:
    """What a session calls. Functions that return a state consume (donate) the one they get.

    ``propagate``, ``prompt``, ``prompt_mask``, ``memorize``, ``memorize_concept``, ``track``,
    ``track_chunk``: as in ``tracking.step``. ``mask_prompt``: as in ``tracking.masks``, a program
    for each video size. ``add``, ``remove``, ``forget_tracked``, ``forget_conditioning``: as in
    ``tracking.state``; ``empty_state(slots=..., grid=...)`` in the compute dtype.
    """

    def __init__(
        self, model: ModelConfig, config: TrackerConfig, *, dtype: DTypeLike = jnp.float32
    ) -> None:
        """Nothing is traced yet.

        Args:
          dtype: compute dtype.

        Raises:
          ValueError: for a configuration that cannot work.
        """
        check(config, model.memory.num_maps)
        self.model, self.config, self.dtype = model, config, dtype
        setup = step.Setup(Sam3(model, dtype), config)

        def program(function: Callable, *, donate: int | None = None, **bound: Any) -> Callable:
            donated = () if donate is None else (donate,)
            return jax.jit(functools.partial(function, **bound), donate_argnums=donated)

        self.propagate = program(step.propagate, setup=setup)
        self.prompt = program(step.prompt, setup=setup)
        self.prompt_mask = program(step.prompt_mask, setup=setup)
        self.memorize = program(step.memorize, donate=1, setup=setup)
        self.memorize_concept = program(step.memorize, donate=1, setup=setup, concept=True)
        self.track = program(step.track, donate=1, setup=setup)
        self.track_chunk = program(step.track_chunk, donate=1, setup=setup)
        self.mask_prompt = jax.jit(masks.mask_prompt, static_argnums=(2, 3))
        self.add = program(state.add_objects, donate=0)
        self.remove = program(state.remove_objects, donate=0)
        self.forget_tracked = program(state.forget_tracked, donate=0, config=config)
        self.forget_conditioning = program(state.forget_conditioning, donate=0, config=config)
        empty = functools.partial(state.empty_state, config, model, dtype=dtype)
        self.empty_state = jax.jit(empty, static_argnames=("slots", "grid"))
