"""Trains the image model on a TPU pod: the paper's stages 2 and 3 (SAM 3, appendix on training).

    python train.py --config=configs/sam3_tpu.py:stage2 --distributed \\
        --config.init.checkpoint=BACKBONE --config.init.prefixes='("vision/trunk/", "text/")' \\
        --config.train.annotations=DATA/train.json --config.output=gs://...or/a/shared/folder

    python train.py --config=configs/sam3_tpu.py:stage3 --distributed \\
        --config.init.checkpoint=runs/sam3_tpu_stage2/model \\
        --config.train.annotations=DATA/train_hq.json

Start the same command on every host. ``stage2`` is also what a run from random values takes: leave
``init`` out.

Hardware: written for a v5e-256 (16 x 16 chips of 16 GB), an image a chip and micro-batch. Compiled
ahead of time, the step of 256 images without clicks takes 5.8 GB a chip (docs/training.md); it has
not been run on one yet. Equal blocks are loops (``scan``): written out, the step is too long.

From the paper: stage 2 has 95k steps of batch 896, rates 5e-4 (vision, layer decay .9), 1e-4 (text)
and 1e-3, reciprocal square root with 5k steps each of warm-up and cool-down; L1 5, GIoU 2, class
100, mask focal 200, dice 10 on 12544 points; dropout .1; no presence. Stage 3 has 5k steps of batch
512, rates x .025, presence, clicks. 20% of the phrases are replaced by a visual prompt, 20% get
boxes besides.

Not as in the paper: batches are powers of two, which pods divide (1024 and 512). Corrective
exemplars over 5 rounds are replaced by up to 5 exemplar boxes, positive and negative, drawn from
the targets. The paper's data are not public in whole.
"""

from __future__ import annotations

from sam3_jax.config import rematerialized, sam3
from sam3_jax.data.augment import paper
from sam3_jax.trainer.config import TrainConfig
from sam3_jax.training.optimizer import pretraining

STAGES = ("stage2", "stage3")


def get_config(stage: str = "stage3") -> TrainConfig:
    """The configuration of a stage."""
    if stage not in STAGES:
        raise ValueError(f"sam3_tpu has no stage {stage!r}: {', '.join(STAGES)}")
    config = TrainConfig(output=f"runs/sam3_tpu_{stage}")
    config.model = rematerialized(sam3(), scan=True)
    config.optimizer = pretraining()
    example = config.data.example
    example.augment = paper()
    example.mask_size = 288
    example.sampling.visual = example.sampling.boxes = 0.2
    example.sampling.phrases = 1
    config.data.workers = 8
    config.loss.class_weight = 100.0
    config.loss.mask_points = 12544
    config.loss.scale_by_prompts = False
    config.mesh.fsdp = 16
    config.checkpoint.every = config.validation.every = 1000
    if stage == "stage2":
        config.steps, config.batch_size = 95_000, 1024
        config.step.accumulate = 4
        config.loss.presence_weight = 0.0
        return config
    config.steps, config.batch_size = 5_000, 512
    config.step.accumulate = 2
    config.optimizer.rate_scale = 0.025
    schedule = config.optimizer.schedule
    schedule.warmup = schedule.cooldown = schedule.timescale = 500
    example.sampling.max_exemplars = 5
    example.sampling.negative_exemplars = 0.5
    example.clicks = 2
    config.clicks.weight = 1.0
    return config
