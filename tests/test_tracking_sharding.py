"""Objects split over eight fake devices: the same results, and nothing sent between them."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from parity import random_params
from sam3_jax import config
from sam3_jax.models.tracker import Tracked
from sam3_jax.sharding import batch_sharding, make_mesh
from sam3_jax.tracking.config import TrackerConfig
from sam3_jax.tracking.memories import frame_at
from sam3_jax.tracking.programs import Programs

CONFIG = config.tiny()
SLOTS = 8
COLLECTIVES = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


@pytest.mark.slow
def test_objects_over_devices(rng):
    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    params = random_params(CONFIG)
    levels = [(draw(1, 32, 32, 4), draw(1, 16, 16, 8), draw(1, 8, 8, 32)) for _ in range(3)]
    on = np.arange(SLOTS) != 3
    ones = np.ones(SLOTS, np.float32)
    given = Tracked(5 * draw(SLOTS, 32, 32), ones, ones, draw(SLOTS, CONFIG.dim))

    def run(mesh: Mesh | None) -> tuple:
        programs = Programs(CONFIG, TrackerConfig())
        state, weights = programs.add(programs.empty_state(slots=SLOTS), on), params
        if mesh is not None:
            state = jax.device_put(state, batch_sharding(mesh))
            weights = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        args = levels[0], frame_at(0, 3), given, on, on, on
        state = programs.memorize(weights, state, *args)
        if mesh is not None:
            compiled = programs.track.lower(weights, state, levels[1], frame_at(1, 3)).compile()
            assert not re.search(COLLECTIVES, compiled.as_text())
        found = []
        for t in (1, 2):
            state, one = programs.track(weights, state, levels[t], frame_at(t, 3))
            found.append(one)
        if mesh is not None:
            assert state.maps.sharding.is_equivalent_to(batch_sharding(mesh), state.maps.ndim)
        return jax.tree.map(np.asarray, (state, found))

    expected = run(None)
    mesh = make_mesh(8)
    with jax.set_mesh(mesh):
        actual = run(mesh)
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        spread = max(1.0, float(np.ptp(b.astype(np.float32))))
        # Other tiles of the same float32 sums.
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), atol=1e-5 * spread)
