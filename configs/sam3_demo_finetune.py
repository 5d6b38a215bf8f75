"""Fine-tunes the bundled demonstration weights on a few pictures of something new, in minutes.

    python -m sam3_jax.demo.coins data/coins
    python train.py --config=configs/sam3_demo_finetune.py --cpu_devices=2

Made for ten pictures of coins, which the weights have never seen (docs/tutorial.md tells how it
goes); for other pictures set ``train.annotations`` and ``valid.annotations``. Everything learns but
the text encoder's layers: the weights have seen drawn things only, photographs look different.

Hardware: two cores of a CPU and 3 GB.
"""

from __future__ import annotations

from sam3_jax.config import demo
from sam3_jax.demo.weights import FOLDER
from sam3_jax.trainer.config import TrainConfig

SIDE = 320  # of the pictures, in pixels: as the weights have learned


def get_config(data: str = "data/coins") -> TrainConfig:
    """The configuration; ``data`` is the folder that ``sam3_jax.demo.coins`` wrote."""
    config = TrainConfig(output="runs/coins", steps=150, batch_size=4)
    config.init.checkpoint = str(FOLDER)
    config.model = demo()
    config.train.annotations = f"{data}/train/annotations.json"
    config.valid.annotations = f"{data}/valid/annotations.json"
    config.data.threads = 1

    example = config.data.example
    example.augment.resolution = example.augment.max_side = SIDE
    example.augment.min_side, example.augment.side_step = SIDE // 2, 8
    example.augment.flip = 0.5
    example.augment.brightness = example.augment.contrast = 0.2
    example.mask_size = SIDE // 2
    example.sampling.phrases = 2
    example.sampling.max_targets = 16
    config.data.buckets = (16,)

    loss = config.loss
    loss.semantic = False
    loss.mask_points, loss.mask_weight, loss.dice_weight = 1024, 20.0, 10.0
    loss.class_pos_weight = 4.0  # as the weights were trained
    loss.pad_queries = config.model.decoder.num_queries

    optimizer = config.optimizer
    optimizer.freeze = (r"^segmentation/semantic/", r"^text/block_")
    optimizer.vision.rate, optimizer.text.rate, optimizer.rest.rate = 5e-4, 2e-3, 1e-3
    optimizer.vision.layer_decay = 1.0
    optimizer.rate_scale = 1.0
    optimizer.beta2 = 0.99
    optimizer.clip = 1.0
    optimizer.schedule.kind = "cosine"
    optimizer.schedule.warmup = 5
    config.step.dtype = "float32"

    config.checkpoint.every = 0
    config.log.every = 10
    return config
