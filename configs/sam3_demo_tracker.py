"""Trains the tracker of the demo's small model on clips of moving shapes and digits.

    python -m sam3_jax.demo.clips data/clips
    python train.py --config=configs/sam3_demo_tracker.py:near --cpu_devices=2
    python train.py --config=configs/sam3_demo_tracker.py:clips --cpu_devices=2
    python -m sam3_jax.demo.bundle runs/sam3_demo_clips/model \\
        --average runs/sam3_demo_clicks/model --average-part image clicks \\
        --output runs/sam3_demo_mean/model
    python train.py --config=configs/sam3_demo_tracker.py:memory --cpu_devices=2
    python train.py --config=configs/sam3_demo.py:finer --cpu_devices=2
    python train.py --config=configs/sam3_demo_tracker.py:last --cpu_devices=2

They begin with ``configs/sam3_demo.py:clicks``: its trunk and necks stay as they are, its
interactive head is where the tracker's begins. Stages:

- ``near``: two frames up to 3 apart, the first with masks: where did objects go?
- ``clips``, from there: 5 frames, prompted by masks, points and boxes. Objects leave and come back.
- ``memory``, from the mean of that and ``clicks``: as ``clips``, but for the head, which stays as
  it is. Following things has cost it clicks on pictures; half-way back it has all of them, and
  memory learns to be read by it;
- ``last``, from there (and a detector that has seen larger pictures): the same at 320 pixels, where
  small things have half as many cells again.

Few corrections, as the head has learned them from pictures.

Hardware: two cores of a CPU and 4 GB.
"""

from __future__ import annotations

from typing import NamedTuple

from sam3_jax.config import demo
from sam3_jax.trainer.config import TrainConfig
from sam3_jax.training.optimizer import IMAGE_MODEL, tracking


class Stage(NamedTuple):
    """What differs between stages."""

    steps: int
    batch: int
    frames: int
    stride: int
    rate: float
    ema: float
    begin: str  # the run whose model it begins with
    freeze: tuple[str, ...] = ()
    side: int = 256  # of the frames, in pixels


# What clicks on pictures are answered with. (Whether an object is there, nobody asks clicks.)
HEAD = (
    r"^tracker/mask_decoder/(?!object_head/)",
    r"^tracker/prompt_encoder/",
    r"^tracker/no_memory_embed/",
)
STAGES = {
    "near": Stage(200, batch=4, frames=2, stride=3, rate=2e-3, ema=0.95, begin="clicks"),
    "clips": Stage(1000, batch=2, frames=5, stride=3, rate=1e-3, ema=0.99, begin="near"),
    "memory": Stage(
        2600, batch=2, frames=5, stride=4, rate=1e-3, ema=0.995, begin="mean", freeze=HEAD
    ),
}
STAGES["last"] = STAGES["memory"]._replace(steps=1000, rate=5e-4, begin="finer", side=320)
# How memory attention begins: with equal biases of queries and keys, which are rotated by where
# they are, each cell looks at the same place and its neighbours. (Of random values cells look
# everywhere alike.)
NEAR = ((r"^tracker/memory_attention/layer_./cross_attn/[qk]/bias$", 2.0),)


def get_config(stage: str = "near", data: str = "data/clips") -> TrainConfig:
    """The configuration of a stage; ``data`` is the folder that ``sam3_jax.demo.clips`` wrote."""
    if stage not in STAGES:
        raise ValueError(f"sam3_demo_tracker has no stage {stage!r}: {', '.join(STAGES)}")
    settings = STAGES[stage]
    near = stage == "near"
    config = TrainConfig(task="tracker", output=f"runs/sam3_demo_{stage}")
    config.steps, config.batch_size = settings.steps, settings.batch
    config.model = demo()
    config.train.annotations = f"{data}/train/annotations.json"
    config.valid.annotations = f"{data}/valid"
    config.data.threads = 1
    config.init.checkpoint = f"runs/sam3_demo_{settings.begin}/model"
    if near:
        config.init.fills = NEAR

    clips = config.clips
    clips.frames, clips.max_stride, clips.objects = settings.frames, settings.stride, 2
    clips.resolution, clips.mask_size = settings.side, settings.side // 2
    clips.flip = clips.affine = clips.gray = 0.0  # digits are not mirrored; objects turn anyway
    clips.brightness = clips.contrast = 0.2

    config.tracker.told_frames, config.tracker.remat = 16, False
    # As for clicks: with 20 : 1 masks become empty first.
    config.tracker.loss.mask_weight = config.tracker.loss.dice_weight = 5.0
    prompting = config.tracker.prompting
    if near:
        prompting.mask, prompting.box, prompting.corrections = 1.0, 0.0, 0
        prompting.second_prompt = prompting.second_correction = 0.0
    else:  # most are given by masks, as detections are
        prompting.mask, prompting.box, prompting.corrections = 0.7, 0.1, 1

    config.optimizer = optimizer = tracking()
    optimizer.freeze = (*IMAGE_MODEL, r"^vision/tracker_neck/", *settings.freeze)
    optimizer.rest.rate = optimizer.vision.rate = settings.rate
    optimizer.weight_decay = 0.05
    optimizer.clip = 1.0
    optimizer.beta2 = 0.99
    optimizer.ema = settings.ema
    optimizer.schedule.warmup = 30
    config.step.dtype = "float32"

    config.checkpoint.best = "J&F"
    config.checkpoint.every = 100
    config.validation.every = 400
    config.validation.images = 6
    config.log.every = 10
    return config
