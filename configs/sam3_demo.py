"""Trains the demo's small SAM 3 from random values on drawn shapes and digits.

    python -m sam3_jax.demo.dataset data/shapes
    python train.py --config=configs/sam3_demo.py

All stages learn together from the released losses: text, exemplar boxes, presence, boxes, masks,
the semantic map and clicks. A fifth of the phrases that name a colour and a shape is replaced by a
box around one of their objects, so that "the same colour and shape" is what a box alone means.

Hardware: two cores of a CPU and 4 GB; the same command takes a GPU where there is one.
"""

from __future__ import annotations

from sam3_jax.config import demo
from sam3_jax.data.augment import plain
from sam3_jax.demo.objects import COLORS, SHAPES
from sam3_jax.trainer.config import TrainConfig

STAGES = ("first", "second")
SIDES = {"first": 128, "second": 256}


def get_config(stage: str = "first", data: str = "data/shapes") -> TrainConfig:
    """The configuration of a stage; ``data`` is the folder that ``sam3_jax.demo.dataset`` wrote."""
    if stage not in STAGES:
        raise ValueError(f"sam3_demo has no stage {stage!r}: {', '.join(STAGES)}")
    side = SIDES[stage]
    config = TrainConfig(output=f"runs/sam3_demo_{stage}", steps=5000, batch_size=4)
    config.model = demo()

    config.data.folder = f"{data}/train"
    config.valid.annotations = f"{data}/valid/annotations.json"
    config.data.threads = 1
    config.data.buckets = (32,)
    example = config.data.example
    example.augment = plain(side)  # no flips (digits), no scales ("small" is a size in pixels)
    example.augment.brightness = example.augment.contrast = 0.2
    example.mask_size = side // 2  # the model's own
    example.clicks = 2
    example.sampling.phrases = 4
    example.sampling.negatives = 0.4
    example.sampling.max_targets = 32
    example.sampling.visual = 0.2
    example.sampling.visual_phrases = f"^({'|'.join(COLORS)}) ({'|'.join(SHAPES)})$"
    example.sampling.boxes = 0.1

    config.loss.pad_queries = config.model.decoder.num_queries
    config.loss.mask_chunk = config.loss.max_pairs = 24
    config.clicks.weight = 1.0
    config.clicks.corrections = 2

    optimizer = config.optimizer
    optimizer.vision.rate = optimizer.text.rate = optimizer.rest.rate = 1e-3
    optimizer.vision.layer_decay = 1.0
    optimizer.rate_scale = 1.0
    optimizer.weight_decay = 0.05
    optimizer.clip = 1.0
    optimizer.ema = 0.999
    optimizer.schedule.kind = "cosine"
    optimizer.schedule.warmup = 200
    config.step.dtype = "float32"

    config.checkpoint.every = 250
    config.validation.every = 500
    config.validation.images = 40
    config.log.every = 10
    return config
