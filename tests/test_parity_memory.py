"""The tracker's memory against torch: encoder and attention, tiny and at the released size."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import oracle
from oracle.params import params_from_hf
from parity import FULL, TINY, assert_close
from sam3_jax import config
from sam3_jax.models.detector import Sam3
from sam3_jax.ops.rope import Rope, axial_rope

pytestmark = pytest.mark.optimised

# transformers fixes the memory's width at 64 and pointers are parted into it.
TINY_CONFIG = dataclasses.replace(
    config.tiny(), dim=128, memory=dataclasses.replace(config.tiny().memory, dim=64)
)
SIZES = [
    pytest.param((TINY_CONFIG, TINY), id="tiny"),
    pytest.param((config.sam3(), FULL), id="full", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=SIZES)
def sides(request):
    """Configuration, tolerance, torch's tracker and our parameters."""
    cfg, tolerance = request.param
    tracker = oracle.randomize(oracle.tracker_video(cfg), seed=3)
    return cfg, tolerance, tracker, params_from_hf(tracker, cfg)


def run(cfg: config.ModelConfig, params: dict, method, *args):
    """One jitted call of a part of the tracker."""
    apply = jax.jit(lambda p, *a: Sam3(cfg).apply({"params": p}, *a, method=method))
    return apply(params, *args)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def grid_of(cfg: config.ModelConfig) -> int:
    return cfg.image_size // cfg.vision.patch_size


def test_memory_encoder(rng, sides):
    cfg, tolerance, tracker, params = sides
    side = grid_of(cfg)
    features = normal(rng, 2, side, side, cfg.dim)
    masks = rng.uniform(-10, 10, (2, 16 * side, 16 * side)).astype(np.float32)
    expected = oracle.run_memory_encoder(tracker, features, masks)

    def encode(module, features, masks):
        return module.tracker.memory_encoder(features, masks[..., None])

    memory = run(cfg, params, encode, features, masks)
    assert_close(memory, expected["memory"], tolerance, "memory")


@pytest.mark.parametrize("padding", [0, 5])
def test_memory_attention(rng, sides, padding):
    """Two remembered maps and three pointers; tokens that are padding change nothing."""
    cfg, tolerance, tracker, params = sides
    side, maps = grid_of(cfg), 2
    pointers = 3 * (cfg.dim // cfg.memory.dim)
    tokens = maps * side**2 + pointers
    features, position = normal(rng, 1, side**2, cfg.dim), normal(rng, 1, side**2, cfg.dim)
    memory, memory_position = (normal(rng, 1, tokens, cfg.memory.dim) for _ in range(2))
    expected = oracle.run_memory_attention(
        tracker, features, position, memory, memory_position, pointers
    )

    rope = axial_rope(
        side, side, cfg.dim // cfg.memory.attention_heads, theta=cfg.memory.rope_theta
    )
    rest = (pointers + padding, rope.cos.shape[1])
    memory_rope = Rope(
        np.concatenate([rope.cos] * maps + [np.ones(rest, np.float32)]),
        np.concatenate([rope.sin] * maps + [np.zeros(rest, np.float32)]),
    )
    mask = np.arange(tokens + padding)[None] < tokens
    more = normal(rng, 2, 1, padding, cfg.memory.dim)
    memory = np.concatenate([memory, more[0]], axis=1)
    memory_position = np.concatenate([memory_position, more[1]], axis=1)

    def attend(module, *args):
        return module.tracker.memory_attention(*args)

    args = (features, position, memory, memory_position, mask, rope, memory_rope)
    actual = run(cfg, params, attend, *args)
    assert_close(actual, expected, tolerance, "conditioned map")


def test_object_pointer(rng, sides):
    """Of a mask token where the object is present, the learned absence where it is not."""
    cfg, tolerance, tracker, params = sides
    tokens = normal(rng, 3, cfg.dim)
    logits = np.array([2.0, -1.0, 0.5], np.float32)

    def point(module, tokens, logits):
        return module.tracker.object_pointer(tokens, logits)

    expected = oracle.run_object_pointer(tracker, tokens, logits)
    assert_close(run(cfg, params, point, tokens, logits), expected, tolerance, "pointer")
