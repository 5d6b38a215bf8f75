"""The tracker's functions, jitted: few programs each, for whatever happens in a bucket."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from sam3_jax.config import ModelConfig
from sam3_jax.models.detector import Sam3
from sam3_jax.ops.attention import BATCH_AXES
from sam3_jax.sharding import batch_sharding
from sam3_jax.tracking import masks, narrow, state, step
from sam3_jax.tracking.config import TrackerConfig, check

T = TypeVar("T")


class Programs:
    """What a session calls. Functions that return a state consume (donate) the one they get.

    ``prompt``, ``prompt_mask``, ``track_chunk``, ``joint_scores``: as in ``tracking.step``.
    ``propagate``, ``track``, ``memorize``, ``memorize_concept``, ``memorize_tracked``: as there,
    for the first ``slots`` (one of ``widths``; default: all), see ``tracking.narrow``; the first
    two read at most ``reads`` prompted frames an object (one of ``reads``; default: all). Each
    choice of these numbers is a program, compiled when it is first made.
    ``mask_prompt``, ``separate``: as in ``tracking.masks``, a program for each video size and for
    each number of buckets. ``add``, ``remove``, ``forget_tracked``, ``forget_conditioning``: as in
    ``tracking.state``; ``empty_state(slots=..., grid=...)`` in the compute dtype.

    On a mesh the slots of a bucket are split over its batch axes, features are whole on every
    device, and nothing is sent between devices while objects are tracked.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: TrackerConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        mesh: Mesh | None = None,
    ) -> None:
        """Nothing is traced yet.

        Args:
          dtype: compute dtype.
          mesh: devices that share the objects; parameters must lie on it.

        Raises:
          ValueError: for a configuration that cannot work.
        """
        check(config, model.memory.num_maps)
        self.model, self.config, self.dtype, self.mesh = model, config, dtype, mesh
        self.rows = None if mesh is None else _rows(mesh, config)
        # The first slots of a bucket that is split are all on one device.
        self.widths = narrow.widths(config.bucket_size) if mesh is None else (config.bucket_size,)
        self.reads = narrow.read_limits(config.max_conditioning)
        setup = step.Setup(Sam3(model, dtype), config)
        rows = self.rows
        chunks = None if mesh is None else NamedSharding(mesh, PartitionSpec(None, *rows.spec))

        def program(
            function: Callable,
            *,
            donate: int | None = None,
            static: tuple[str, ...] = (),
            out: Any = rows,
            **bound: Any,
        ) -> Callable:
            jitted = jax.jit(
                functools.partial(function, **bound),
                donate_argnums=() if donate is None else (donate,),
                static_argnames=static,
                out_shardings=out,
            )
            return self._on_mesh(jitted)

        by_slots, by_reads = ("slots",), ("slots", "reads")
        self.propagate = program(narrow.propagate, static=by_reads, setup=setup)
        self.prompt = program(step.prompt, setup=setup)
        self.prompt_mask = program(step.prompt_mask, setup=setup)
        self.memorize = program(narrow.memorize, donate=1, static=by_slots, setup=setup)
        self.memorize_concept = program(
            narrow.memorize, donate=1, static=by_slots, setup=setup, concept=True
        )
        self.memorize_tracked = program(
            narrow.memorize_tracked, donate=1, static=by_slots, setup=setup
        )
        self.track = program(narrow.track, donate=1, static=by_reads, setup=setup)
        self.track_chunk = program(step.track_chunk, donate=1, out=(rows, chunks), setup=setup)
        self.joint_scores = program(step.joint_scores)
        self.separate = program(masks.separate, size=step.frame_size(model))
        self.mask_prompt = jax.jit(masks.mask_prompt, static_argnums=(2, 3))
        self.add = program(state.add_objects, donate=0)
        self.remove = program(state.remove_objects, donate=0)
        self.forget_tracked = program(state.forget_tracked, donate=0, config=config)
        self.forget_conditioning = program(state.forget_conditioning, donate=0, config=config)
        empty = functools.partial(state.empty_state, config, model, dtype=dtype)
        self.empty_state = self._on_mesh(
            jax.jit(empty, static_argnames=("slots", "grid"), out_shardings=rows)
        )

    def width(self, slots: int) -> int:
        """The least of ``widths`` that has room for so many slots."""
        return next(width for width in self.widths if width >= slots)

    def reads_for(self, frames: int) -> int:
        """The least of ``reads`` for objects that have so many prompted frames, or less."""
        return next((reads for reads in self.reads if reads >= frames), self.reads[-1])

    def place(self, arrays: T) -> T:
        """Puts arrays whose first axis is the slot where the programs leave such arrays."""
        return arrays if self.mesh is None else jax.device_put(arrays, self.rows)

    def _on_mesh(self, jitted: Callable) -> Callable:
        """Runs a program with the mesh in sight of the model."""
        if self.mesh is None:
            return jitted

        @functools.wraps(jitted)
        def run(*args: Any, **static: Any) -> Any:
            with jax.set_mesh(self.mesh):
                return jitted(*args, **static)

        return run


def _rows(mesh: Mesh, config: TrackerConfig) -> NamedSharding:
    """Slots over the batch axes.

    Raises:
      ValueError: where they do not divide a bucket.
    """
    shards = math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)
    if config.bucket_size % shards:
        least = -(-config.bucket_size // shards) * shards
        raise ValueError(
            f"bucket_size={config.bucket_size}: {shards} devices share the objects of a bucket, so "
            f"it must be a multiple of {shards}; take {least}"
        )
    return batch_sharding(mesh)
