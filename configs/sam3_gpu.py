"""Trains all of SAM 3, clicks included, on the GPUs of one machine.

    python train.py --config=configs/sam3_gpu.py \\
        --config.init.checkpoint=sam3_jax_ckpt \\
        --config.train.annotations=DATA/train.json --config.train.images=DATA/train \\
        --config.valid.annotations=DATA/valid.json --config.valid.images=DATA/valid \\
        --config.output=runs/mine

The paper's stage 3 rates on batches that GPUs hold: for data that are larger or further from the
released model's than a fine-tuning set. Cosine schedule, phrases and exemplar boxes, masks on 12544
points, and the interactive head besides.

Hardware: 1 to 8 GPUs of 80 GB, four images each (docs/training.md says what was measured). For
several give the batch, ``--config.batch_size=32``; ``--config.mesh.fsdp=8`` splits parameters and
moments.
"""

from __future__ import annotations

from sam3_jax.config import rematerialized, sam3
from sam3_jax.data.augment import paper
from sam3_jax.trainer.config import TrainConfig
from sam3_jax.training.optimizer import pretraining


def get_config() -> TrainConfig:
    """The configuration."""
    config = TrainConfig(output="runs/sam3_gpu", steps=20_000, batch_size=4)
    config.model = rematerialized(sam3())
    config.optimizer = pretraining()
    config.optimizer.rate_scale = 0.025
    config.optimizer.schedule.kind = "cosine"
    config.optimizer.schedule.warmup = 500
    example = config.data.example
    example.augment = paper()
    example.mask_size = 288
    example.sampling.visual = example.sampling.boxes = 0.2
    example.sampling.phrases = 2
    example.clicks = 2
    config.data.workers = 4
    config.loss.mask_points = 12544
    config.clicks.weight = 1.0
    config.checkpoint.every = config.validation.every = 1000
    return config
