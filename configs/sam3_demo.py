"""Trains the demo's small SAM 3 from random values on drawn shapes and digits.

    python -m sam3_jax.demo.dataset data/shapes
    python train.py --config=configs/sam3_demo.py:words --cpu_devices=2
    ... and so on with :scenes, :boxes, :masks, :regions, :all, :regions2, :all2, :pointing, :clicks
    python train.py --config=configs/sam3_demo.py:finer --cpu_devices=2

Each stage begins with the model of the one before, ``finer`` with the one whose tracker has been
trained (``configs/sam3_demo_tracker.py``):

- ``words``: what phrases mean, by contrast (``sam3_jax/training/contrast.py``), of trunk and text
  encoder on close-ups of 64 pixels with three objects at most; the released model's were learned by
  contrast, too, before there was a detector;
- ``scenes``: the same on whole pictures of 192 pixels;
- ``boxes``: the detector finds boxes, with trunk and text encoder as contrast left them;
- ``masks``: masks besides, at 256 pixels;
- ``regions``: contrast again, and where each phrase's objects are, pixel by pixel; a share of the
  pictures is grey, so that colour and shape come apart;
- ``all``: the detector with all losses, and the trunk;
- ``regions2``: as ``regions``, with half of the pictures grey;
- ``all2``: as ``all``, with contrast and regions beside it, and losses that part an object's best
  answer from its others;
- ``pointing``: the interactive head, on the image model as it is, learns where a click is;
- ``clicks``: and then which object it is on;
- ``finer``: the detector at 320 pixels, on the trunk as it is.

The losses are the released ones, of other weights. A fifth of the phrases that name a colour and a
shape is replaced by a box around one of their objects, so that "the same colour and shape" is what
a box alone means.

Hardware: two cores of a CPU and 5 GB; without ``--cpu_devices`` a GPU where there is one. The
stages took 36, 35, 22, 25, 24, 64, 25, 52, 2, 26 and 20 minutes, with other work on the same cores.
On held-out pictures cgF1 is 49 for phrases and 48 for one exemplar box, 10 for pairs that training
never showed, and one click gives a mean IoU of .74; docs/demo has logs, curves, figures and limits.
"""

from __future__ import annotations

from typing import NamedTuple

from sam3_jax.config import demo
from sam3_jax.data.augment import plain
from sam3_jax.demo.builder import CLOSE_UPS
from sam3_jax.demo.objects import COLORS, SHAPES
from sam3_jax.trainer.config import TrainConfig
from sam3_jax.training.optimizer import IMAGE_MODEL


class Stage(NamedTuple):
    """What differs between stages."""

    folder: str  # of the data
    side: int  # of the pictures, in pixels
    steps: int
    batch: int
    learns: str  # of LEARNS
    phrases: int = 4  # a picture
    gray: float = 0.0  # share of the pictures without colours
    fine: bool = False  # masks are compared at twice the model's resolution
    seed: int = 0  # of the pictures' order and changes


# What a stage trains, by the parameters that it leaves alone; those that its losses do not reach
# (the detector's: the tracker) are frozen in any case. Random vectors tell some forty words apart
# as they are, and are half of all parameters.
WORDS = r"^text/token_embed/"
LEARNS = {
    "meanings": (WORDS,),
    "regions": (WORDS,),
    "boxes": (r"^text/", r"^vision/trunk/"),
    "masks": (r"^text/", r"^vision/trunk/"),
    "all": (r"^text/",),
    "clicks": IMAGE_MODEL,
}
LEARNS["detector"] = LEARNS["masks"]
# How the interactive head begins: what a click is near to is seen from the start. Queries and keys
# are one projection, so that the codes of like positions attend to each other (and every token to
# itself: all would look the same after the first layer); what the image reads of tokens, and what
# masks are made of, is larger than random values leave it.
SELF = ("blocks_0/self_attn", "blocks_1/self_attn")
ACROSS = ("blocks_0/token_to_image", "blocks_0/image_to_token", "final_attn")
ACROSS += ("blocks_1/token_to_image", "blocks_1/image_to_token")
HEAD = "tracker/mask_decoder"
COPIES = (
    ("vision/tracker_neck/", "vision/detector_neck/"),
    *((f"{HEAD}/{name}/q/", f"{HEAD}/{name}/k/") for name in SELF + ACROSS),
)
SCALES = (
    (rf"^{HEAD}/({'|'.join(SELF)})/[qk]/kernel$", 1.5),
    (rf"^{HEAD}/({'|'.join(ACROSS)})/[qk]/kernel$", 2.0),
    (rf"^{HEAD}/blocks_./image_to_token/out/kernel$", 4.0),
    (rf"^{HEAD}/(upscale_.|hypernetworks_./layer_.)/kernel$", 2.0),
)
STAGES = {
    "words": Stage("words", side=64, steps=3000, batch=64, learns="meanings"),
    "scenes": Stage("train", side=192, steps=3500, batch=16, learns="meanings", phrases=8),
    "boxes": Stage("train", side=192, steps=1400, batch=16, learns="boxes"),
    "masks": Stage("train", side=256, steps=1300, batch=8, learns="masks", phrases=2),
    "regions": Stage(
        "train", side=256, steps=1600, batch=8, learns="regions", phrases=8, gray=0.3, fine=True
    ),
    "all": Stage(
        "train", side=256, steps=1900, batch=8, learns="all", phrases=2, gray=0.2, fine=True
    ),
}
STAGES["regions2"] = STAGES["regions"]._replace(steps=1500, gray=0.5, seed=11)
STAGES["all2"] = STAGES["all"]._replace(gray=0.3, seed=12)
STAGES["pointing"] = Stage(
    "train", side=256, steps=120, batch=8, learns="clicks", phrases=4, fine=True, seed=13
)
STAGES["clicks"] = STAGES["pointing"]._replace(steps=1100, seed=14)
STAGES["finer"] = STAGES["all2"]._replace(side=320, steps=600, learns="detector", seed=15)


def get_config(stage: str = "words", data: str = "data/shapes") -> TrainConfig:
    """The configuration of a stage; ``data`` is the folder that ``sam3_jax.demo.dataset`` wrote."""
    if stage not in STAGES:
        raise ValueError(f"sam3_demo has no stage {stage!r}: {', '.join(STAGES)}")
    folder, side, steps, batch, learns, phrases, gray, fine, seed = STAGES[stage]
    config = TrainConfig(output=f"runs/sam3_demo_{stage}", steps=steps, batch_size=batch)
    contrast = learns in ("meanings", "regions")
    config.task, config.model = "contrast" if contrast else "pictures", demo()
    names = list(STAGES)
    if stage != names[0]:
        before = "memory" if stage == "finer" else names[names.index(stage) - 1]
        config.init.checkpoint = f"runs/sam3_demo_{before}/model"

    config.data.folder = f"{data}/{folder}"
    config.data.threads, config.data.seed = 1, seed
    config.data.buckets = (4,) if folder in CLOSE_UPS else (32,)
    example = config.data.example
    example.augment = plain(side)  # no flips (digits), no scales ("small" is a size in pixels)
    example.augment.brightness = example.augment.contrast = 0.2
    example.augment.gray = gray
    # The model's own size is a quarter; from twice as fine ones it learns what lies between.
    example.mask_size = 0 if learns == "boxes" else side // 2 if fine else side // 4
    example.sampling.phrases = phrases
    example.sampling.max_targets = config.data.buckets[-1]
    if contrast:
        config.data.workers = 2  # batches take longer than steps
        example.sampling.negatives = 0.25 if learns == "regions" else 0.0
        config.contrast.regions = 3.0 if learns == "regions" else 0.0
    else:
        config.valid.annotations = f"{data}/valid/annotations.json"
        example.sampling.negatives = 0.4
        example.sampling.visual = 0.2
        example.sampling.visual_phrases = f"^({'|'.join(COLORS)}) ({'|'.join(SHAPES)})$"
        example.sampling.boxes = 0.1

    loss = config.loss
    loss.masks = loss.semantic = learns in ("masks", "all", "detector")
    loss.pad_queries = config.model.decoder.num_queries
    loss.mask_chunk = loss.max_pairs = 8
    loss.class_weight = loss.presence_weight = 50.0
    loss.box_weight, loss.giou_weight = 10.0, 5.0
    loss.mask_weight = 100.0
    if learns in ("all", "detector"):
        loss.class_weight = loss.presence_weight = 20.0
        # On points, most of them where the model is in doubt, the focal loss is larger.
        loss.mask_points, loss.mask_weight = 1024, 20.0
        loss.semantic_weight = loss.semantic_dice_weight = 10.0
    if stage in ("all2", "finer"):
        # Of 32 queries few are far from every object: the released weight of 10 on those that are
        # right makes duplicates.
        loss.class_pos_weight, loss.class_weight, loss.o2m_weight = 4.0, 40.0, 1.0
    if stage == "all2":
        config.contrast.along, config.contrast.regions = 10.0, 3.0
    if learns == "clicks":
        example.clicks, example.sampling.negatives = 4, 0.0
        config.clicks.weight, config.clicks.alone, config.clicks.corrections = 1.0, True, 1
        # From random values, 20 : 1 first learns that every mask is empty.
        config.clicks.loss.mask_weight = config.clicks.loss.dice_weight = 5.0
    if stage == "pointing":
        config.clicks.disc, config.clicks.corrections = 28.0, 0
        config.init.copies, config.init.scales = COPIES, SCALES

    optimizer = config.optimizer
    optimizer.freeze = LEARNS[learns]
    optimizer.vision.rate = optimizer.text.rate = optimizer.rest.rate = 1e-3
    if learns == "regions":
        optimizer.vision.rate, optimizer.text.rate = 8e-4, 5e-4
    if learns in ("masks", "all"):  # most of the detector has learned already
        optimizer.vision.rate = optimizer.rest.rate = 8e-4
    if learns == "all":
        optimizer.vision.rate = 4e-4
    if learns == "detector":
        optimizer.vision.rate = optimizer.rest.rate = 4e-4
    if learns == "clicks":
        optimizer.vision.rate = optimizer.rest.rate = 3e-3
    optimizer.vision.layer_decay = 1.0
    optimizer.rate_scale = 1.0
    optimizer.beta2 = 0.99
    optimizer.weight_decay = 0.05
    optimizer.clip = 1.0
    optimizer.ema = {"pointing": 0.9, "clicks": 0.99, "finer": 0.99}.get(stage, 0.999)
    optimizer.schedule.kind = "cosine"
    started = stage in ("words", "scenes", "boxes")
    warmup = 200 if started else 50 if fine else 100
    optimizer.schedule.warmup = 30 if learns == "clicks" else warmup
    config.step.dtype = "float32"

    config.checkpoint.every = 250
    config.validation.every = 1000
    config.validation.images = 40
    config.log.every = 10
    return config
