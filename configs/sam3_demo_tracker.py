"""Trains the tracker of the demo's small model on clips of moving shapes and digits.

    python -m sam3_jax.demo.clips data/clips
    python train.py --config=configs/sam3_demo_tracker.py \\
        --config.init.checkpoint=runs/sam3_demo_clicks/model

The checkpoint is that of ``configs/sam3_demo.py:clicks``: its trunk is frozen, its interactive head
is where the tracker's begins. Clips have 5 frames of 2 objects at 256 pixels; frames may be up to 3
apart, so that objects leave and come back within a clip. Few corrections, as the head has learned
them from pictures.

Hardware: two cores of a CPU and 4 GB.
"""

from __future__ import annotations

from sam3_jax.config import demo
from sam3_jax.trainer.config import TrainConfig
from sam3_jax.training.optimizer import tracking


def get_config(data: str = "data/clips") -> TrainConfig:
    """The configuration; ``data`` is the folder that ``sam3_jax.demo.clips`` wrote."""
    config = TrainConfig(task="tracker", output="runs/sam3_demo_tracker", steps=700, batch_size=2)
    config.model = demo()
    config.train.annotations = f"{data}/train/annotations.json"
    config.valid.annotations = f"{data}/valid"
    config.data.threads = 1

    clips = config.clips
    clips.frames, clips.max_stride, clips.objects = 5, 3, 2
    clips.resolution, clips.mask_size = 256, 128
    clips.flip = clips.affine = clips.gray = 0.0  # digits are not mirrored; objects turn anyway
    clips.brightness = clips.contrast = 0.2

    # The head has learned to be corrected; what is measured is tracking.
    config.tracker.prompting.corrections = 1
    config.tracker.told_frames = 16

    config.optimizer = optimizer = tracking()
    optimizer.rest.rate = optimizer.vision.rate = 1e-3
    optimizer.weight_decay = 0.05
    optimizer.clip = 1.0
    optimizer.ema = 0.99
    optimizer.schedule.warmup = 50
    config.step.dtype = "float32"

    config.checkpoint.best = "J&F"
    config.checkpoint.every = 100
    config.validation.every = 400
    config.validation.images = 6
    config.log.every = 10
    return config
