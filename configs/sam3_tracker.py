"""Trains the tracker of SAM 3 on videos with masklets: stage 4 of the paper.

    python train.py --config=configs/sam3_tracker.py \\
        --config.init.checkpoint=sam3_jax_ckpt \\
        --config.train.annotations=YTVIS/train/instances.json \\
        --config.valid.annotations=DAVIS --config.output=runs/tracker

    python train.py --config=configs/sam3_tracker.py:long --distributed \\
        --config.init.checkpoint=runs/tracker/model --config.train.annotations=SAV/sav_train

``train.annotations``: a YouTube-VIS file (frames in JPEGImages beside it, or in ``train.images``)
or a folder of SA-V (videos beside their JSON). ``valid.annotations``: a copy of DAVIS.

From the paper (arXiv 2511.16719, appendix on training): the image model is frozen, 190k steps of
batch 512, rates with a peak of 5e-4 and a cosine; then (``long``) 60k steps with longer clips at a
tenth of it. Losses focal 20, dice 1, IoU 1, occlusion 1 on the best mask.
From SAM 2 (arXiv 2408.00714), as upstream does not release this training: clips of 8 frames, 3
objects, forwards or backwards; a mask half of the time, else a point or a box; one or two frames
prompted, 7 corrective clicks; flips, turns, shears, colours. AdamW with weight decay .1 and clip .1
are those of the released detector recipe. The trunk alone is frozen here: the neck in front of the
tracker is the tracker's own, no other part reads it.

Hardware: written for a v5e-256, two clips a chip in two micro-batches; not run. A small tracker's
step has been compiled for four v5e chips (``tests/test_aot_train.py``), not one of this size.
``long`` has 16 frames.
"""

from __future__ import annotations

from sam3_jax.config import rematerialized, sam3
from sam3_jax.trainer.config import TrainConfig
from sam3_jax.training.optimizer import tracking

VARIANTS = ("clips", "long")


def get_config(variant: str = "clips") -> TrainConfig:
    """The configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"sam3_tracker has no variant {variant!r}: {', '.join(VARIANTS)}")
    config = TrainConfig(task="tracker", output=f"runs/sam3_tracker_{variant}")
    config.model = rematerialized(sam3(), scan=True)
    config.optimizer = tracking()
    config.steps, config.batch_size = 190_000, 512
    config.step.accumulate = 2
    config.data.workers = 8
    config.mesh.fsdp = 16
    config.checkpoint.best = "J&F"
    config.checkpoint.every = config.validation.every = 1000
    if variant == "long":
        config.steps, config.clips.frames = 60_000, 16
        config.optimizer.rate_scale = 0.1
    return config
