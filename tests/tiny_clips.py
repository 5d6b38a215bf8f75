"""A toy model and clips for the tests of the tracker's training."""

from __future__ import annotations

import jax
import numpy as np

import tiny_predictor
from sam3_jax.config import ModelConfig
from sam3_jax.models.detector import init_shapes
from sam3_jax.training import optimizer as optimizers
from sam3_jax.training.clip_batch import ClipBatch
from sam3_jax.training.optimizer import Optimizer
from sam3_jax.training.tracker_clip import TrackerTrainingConfig
from sam3_jax.training.tracker_step import unused_by_clips

SIDE, MASK = 112, 32
QUICK = {"xla_backend_optimization_level": 0}  # a third of the time to compile


def model_config() -> ModelConfig:
    """As small as it can be, without dropout."""
    model = tiny_predictor.config()
    model.memory.attention_depth = model.memory.fuser_depth = 1
    model.memory.dropout = 0.0
    return model


def params(model: ModelConfig) -> dict:
    """Random values that keep activations near 1; objects mostly are there."""
    rng = np.random.default_rng(0)

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name, noise = path[-1].key, rng.normal(size=leaf.shape).astype(leaf.dtype)
        if name == "kernel":
            return noise / np.prod(leaf.shape[:-1]).astype(leaf.dtype) ** 0.5
        return 1 + 0.1 * noise if name == "scale" else 0.3 * noise

    made = jax.tree_util.tree_map_with_path(fill, init_shapes(model))
    made["tracker"]["mask_decoder"]["object_head"]["layer_2"]["bias"] += 2.0
    return made


def batch(clips: int = 2, objects: int = 2, frames: int = 3) -> ClipBatch:
    """Bright squares that move straight on over noise; the last object is gone at the end."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 60, (clips, frames, SIDE, SIDE, 3)).astype(np.uint8)
    masks = np.zeros((clips, objects, frames, MASK, MASK), bool)
    scale = SIDE / MASK
    for clip, number in np.ndindex(clips, objects):
        place, way = rng.integers(0, 16, 2), rng.integers(-3, 4, 2)
        for t in range(frames):
            if t == frames - 1 and number == objects - 1 and objects > 1:
                continue
            y, x = np.clip(place + way * t, 0, MASK - 12)
            masks[clip, number, t, y : y + 12, x : x + 12] = True
            y0, y1, x0, x1 = (int(v * scale) for v in (y, y + 12, x, x + 12))
            pixels[clip, t, y0:y1, x0:x1] = (200, 40 + 70 * number, 40)
    yes = np.ones((clips, objects), bool)
    return ClipBatch(pixels, masks, np.ones(masks.shape[:3], bool), yes)


def optimizer(config: TrackerTrainingConfig, *, ema: float = 0.0) -> Optimizer:
    """Fast enough to learn in few steps."""
    settings = optimizers.tracking()
    settings.freeze, settings.ema, settings.clip = unused_by_clips(config), ema, 1.0
    settings.vision.rate = settings.rest.rate = 2e-3
    settings.schedule.warmup = 0
    return optimizers.make_optimizer(settings, depth=2, total=1000)
