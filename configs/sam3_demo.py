"""Trains the demo's small SAM 3 from random values on drawn shapes and digits.

    python -m sam3_jax.demo.dataset data/shapes
    python train.py --config=configs/sam3_demo.py:words --cpu_devices=2
    ... and so on with :forms, :first, :second, :clicks

Each stage begins with the model of the one before. ``words`` and ``forms`` look at close-ups of 64
pixels with three objects at most: what words mean is learned there from four times as many phrases
a second as from whole pictures, of which 770 steps taught hardly any of it. ``first`` finds things
in whole pictures of 192 pixels, ``second`` at 256 with their masks; ``clicks`` trains the
interactive head on the image model as it is. The losses are the released ones, of other weights. A
fifth of the phrases that name a colour and a shape is replaced by a box around one of their
objects, so that "the same colour and shape" is what a box alone means.

Hardware: two cores of a CPU and 5 GB; without ``--cpu_devices`` a GPU where there is one. Two cores
make 40 close-ups a second, or 10 pictures of 192 pixels. The later stages have not been run yet. Of
held-out close-ups, how well presence tells phrases for what is there from others (area under the
curve), after 3081 steps of ``words``: colours .998, sizes .94, shapes .81, textures .66, digits
.60. That run had a weight of 20 for its first 643 steps, and its schedule was lengthened twice, to
6500 steps at last.
"""

from __future__ import annotations

from typing import NamedTuple

from sam3_jax.config import demo
from sam3_jax.data.augment import plain
from sam3_jax.demo.builder import CLOSE_UPS
from sam3_jax.demo.objects import COLORS, SHAPES
from sam3_jax.trainer.config import TrainConfig


class Stage(NamedTuple):
    """What differs between stages."""

    folder: str  # of the data
    side: int  # of the pictures, in pixels
    steps: int
    batch: int
    rate: float
    recognition: float = 20.0  # weight of classes and presence
    masks: bool = True
    clicks: int = 0  # objects an image to click on; if any, nothing but the interactive head learns


STAGES = {
    "words": Stage("words", side=64, steps=3000, batch=32, rate=1e-3, recognition=100.0),
    "forms": Stage("forms", side=64, steps=6000, batch=32, rate=1e-3, recognition=100.0),
    "first": Stage("train", side=192, steps=6000, batch=8, rate=1e-3, masks=False),
    "second": Stage("train", side=256, steps=1500, batch=8, rate=5e-4),
    "clicks": Stage("train", side=256, steps=800, batch=8, rate=1e-3, masks=False, clicks=4),
}
DETECTOR = (r"^vision/(trunk|detector_neck)/", r"^(text|geometry|fusion|decoder)/")
DETECTOR += (r"^(scoring|segmentation)/",)


def get_config(stage: str = "words", data: str = "data/shapes") -> TrainConfig:
    """The configuration of a stage; ``data`` is the folder that ``sam3_jax.demo.dataset`` wrote."""
    if stage not in STAGES:
        raise ValueError(f"sam3_demo has no stage {stage!r}: {', '.join(STAGES)}")
    folder, side, steps, batch, rate, recognition, masks, clicks = STAGES[stage]
    config = TrainConfig(output=f"runs/sam3_demo_{stage}", steps=steps, batch_size=batch)
    config.model = demo()
    names = list(STAGES)
    if stage != names[0]:
        config.init.checkpoint = f"runs/sam3_demo_{names[names.index(stage) - 1]}/model"

    config.data.folder = f"{data}/{folder}"
    near = folder in CLOSE_UPS
    if not near:  # the held-out pictures are whole ones
        config.valid.annotations = f"{data}/valid/annotations.json"
    config.data.threads = 1
    config.data.buckets = (4,) if near else (32,)
    example = config.data.example
    example.augment = plain(side)  # no flips (digits), no scales ("small" is a size in pixels)
    example.augment.brightness = example.augment.contrast = 0.2
    example.mask_size = side // 4  # the model's own
    example.sampling.phrases = 4
    example.sampling.negatives = 0.5 if near else 0.3
    example.sampling.max_targets = config.data.buckets[-1]
    example.sampling.visual = 0.2
    example.sampling.visual_phrases = f"^({'|'.join(COLORS)}) ({'|'.join(SHAPES)})$"
    example.sampling.boxes = 0.1

    loss = config.loss
    loss.masks = masks
    loss.pad_queries = config.model.decoder.num_queries
    loss.mask_chunk = loss.max_pairs = 8
    loss.class_weight = loss.presence_weight = recognition
    loss.box_weight, loss.giou_weight = 10.0, 5.0
    loss.mask_weight = 100.0

    if clicks:
        example.clicks, example.sampling.phrases = clicks, 1
        config.clicks.weight, config.clicks.corrections = 1.0, 2
        loss.semantic = False
    optimizer = config.optimizer
    # Random vectors tell some forty words apart as they are, and are half of all parameters.
    optimizer.freeze = DETECTOR if clicks else (r"^text/token_embed/",)
    optimizer.vision.rate = optimizer.text.rate = optimizer.rest.rate = rate
    optimizer.vision.layer_decay = 1.0
    optimizer.rate_scale = 1.0
    optimizer.beta2 = 0.99
    optimizer.weight_decay = 0.05
    optimizer.clip = 1.0
    optimizer.ema = 0.999
    optimizer.schedule.kind = "cosine"
    optimizer.schedule.warmup = 200
    config.step.dtype = "float32"

    config.checkpoint.every = 250
    config.validation.every = 1000
    config.validation.images = 40
    config.log.every = 10
    return config
