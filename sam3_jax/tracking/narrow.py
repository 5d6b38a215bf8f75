"""Programs for less than a full bucket, so that one object, prompted once, does not cost that much.

Objects take the first free slots. Where those behind a number of slots are free, a program for so
many gives what the program for all gives. And where no object has more than so many prompted
frames, a program that reads no more of them gives what the program that reads all gives (both but
for rounding). There are few such numbers, of 16 slots 1, 2, 4, 8, 16, of prompted frames one and
all, so few programs compile, each when it is first needed.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sam3_jax.models.tracker import ABSENT, Tracked
from sam3_jax.tracking import step
from sam3_jax.tracking.memories import Frame
from sam3_jax.tracking.state import TrackState
from sam3_jax.types import Levels

T = TypeVar("T")


def widths(slots: int) -> tuple[int, ...]:
    """Numbers of slots that there are programs for, ascending: a bucket, a half of it, .. 1."""
    found = [slots]
    while found[-1] > 1:
        found.append(-(-found[-1] // 2))
    return tuple(reversed(found))


def read_limits(most: int) -> tuple[int, ...]:
    """Numbers of prompted frames that there are programs for, ascending: one, and all."""
    return tuple(sorted({1, most}))


def propagate(
    params: step.Params,
    state: TrackState,
    levels: Levels,
    frame: Frame,
    *,
    setup: step.Setup,
    slots: int | None = None,
    reads: int | None = None,
) -> Tracked:
    """:func:`.step.propagate` for the first ``slots``; the others' objects are absent.

    ``reads``: how many prompted frames of an object are read at most.
    """
    setup = _reading(setup, reads)
    found = step.propagate(params, _first(state, slots), levels, frame, setup=setup)
    return _widened(found, len(state.valid))


def track(
    params: step.Params,
    state: TrackState,
    levels: Levels,
    frame: Frame,
    *,
    setup: step.Setup,
    slots: int | None = None,
    reads: int | None = None,
) -> tuple[TrackState, Tracked]:
    """:func:`.step.track` for the first ``slots``; ``reads`` as for :func:`propagate`."""
    setup = _reading(setup, reads)
    part, found = step.track(params, _first(state, slots), levels, frame, setup=setup)
    return _put(state, part), _widened(found, len(state.valid))


def memorize(
    params: step.Params,
    state: TrackState,
    levels: Levels,
    frame: Frame,
    found: Tracked,
    write: Bool[Array, " s"],
    conditioning: Bool[Array, " s"],
    prompted: Bool[Array, " s"],
    scores: Float[Array, " s"] | None = None,
    *,
    setup: step.Setup,
    concept: bool = False,
    slots: int | None = None,
) -> TrackState:
    """:func:`.step.memorize` for the first ``slots``."""
    given = _first((state, found, write, conditioning, prompted, scores), slots)
    part = step.memorize(params, given[0], levels, frame, *given[1:], setup=setup, concept=concept)
    return _put(state, part)


def memorize_tracked(
    params: step.Params,
    state: TrackState,
    levels: Levels,
    frame: Frame,
    found: Tracked,
    scores: Float[Array, " s"] | None = None,
    *,
    setup: step.Setup,
    slots: int | None = None,
) -> TrackState:
    """:func:`.step.memorize_tracked` for the first ``slots``."""
    given = _first((state, found, scores), slots)
    part = step.memorize_tracked(params, given[0], levels, frame, *given[1:], setup=setup)
    return _put(state, part)


def _reading(setup: step.Setup, reads: int | None) -> step.Setup:
    if reads is None:
        return setup
    return setup._replace(config=dataclasses.replace(setup.config, max_conditioning=reads))


def _first(arrays: T, slots: int | None) -> T:
    return jax.tree.map(lambda x: x[:slots], arrays)


def _put(state: TrackState, part: TrackState) -> TrackState:
    return jax.tree.map(
        lambda whole, new: new if len(new) == len(whole) else whole.at[: len(new)].set(new),
        state,
        part,
    )


def _widened(found: Tracked, slots: int) -> Tracked:
    """Absent objects behind those that were looked for."""
    more = slots - len(found.iou)
    if not more:
        return found
    empty = Tracked(ABSENT, 0.0, -step.PRESENT, 0.0)
    return jax.tree.map(
        lambda x, fill: jnp.pad(x, ((0, more), *((0, 0),) * (x.ndim - 1)), constant_values=fill),
        found,
        empty,
    )
