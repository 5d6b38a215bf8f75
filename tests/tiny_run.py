"""A training run of the toy model on three small pictures; also a file for ``--config``."""

from __future__ import annotations

import json
from pathlib import Path

import data_sets
import tiny_predictor
from sam3_jax import checkpoint
from sam3_jax.data.augment import plain
from sam3_jax.trainer.config import TrainConfig

STEPS = 4


def get_config() -> TrainConfig:
    """Everything on: masks, clicks, noise of dropout and of augmentation."""
    config = TrainConfig(steps=STEPS, batch_size=2)
    config.model = tiny_predictor.config()
    config.step.dtype = "float32"
    config.step.matcher = "device"  # the compilation cache keeps no host callbacks
    config.optimizer.schedule.kind = "cosine"
    config.optimizer.schedule.warmup = 0
    config.optimizer.rate_scale = 0.01
    config.optimizer.freeze = ("^text/",)
    config.data.example.augment = plain(112)
    config.data.example.augment.flip = 0.5
    config.data.example.mask_size = 32
    config.data.example.clicks = 1
    config.data.example.sampling.phrases = 2
    config.data.example.sampling.boxes = 0.5
    config.data.example.sampling.max_targets = 4
    config.data.buckets = (4,)
    config.clicks.weight = 1.0
    config.clicks.corrections = 1
    config.log.every = 1
    config.log.tensorboard = False
    return config


def write_checkpoint(path: Path) -> Path:
    """The toy model's weights: making random ones in the run would compile for half a minute."""
    checkpoint.save(path, tiny_predictor.params(), tiny_predictor.config())
    return path


def write_data(folder: Path) -> Path:
    """Pictures and annotations in the layout of COCO; returns the file."""
    folder.mkdir(parents=True)
    data_sets.write_pictures(folder)
    path = folder / "annotations.json"
    path.write_text(json.dumps(data_sets.coco()))
    return path
