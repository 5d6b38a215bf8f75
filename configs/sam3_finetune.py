"""Fine-tunes a converted checkpoint on your own annotations: the released recipe.

    python train.py --config=configs/sam3_finetune.py \\
        --config.init.checkpoint=sam3_jax_ckpt \\
        --config.train.annotations=DATA/train/_annotations.coco.json \\
        --config.valid.annotations=DATA/valid/_annotations.coco.json \\
        --config.output=runs/mine

Upstream: ``sam3/train/configs/roboflow_v100/roboflow_v100_full_ft_100_images.yaml``: AdamW, rates
.1 x (8e-4, vision 2.5e-4 with layer decay .9, text 5e-5), inverse square root, clip .1, 20 epochs,
an image a GPU, sides from 480 to 1008 padded at random.

Variants, as in ``--config=configs/sam3_finetune.py:lora``:

    masks   (default) boxes, masks and the semantic map, so that masks learn the new concepts too
    boxes   without mask losses, as the released file: quicker, and for annotations without masks
    lora    masks, with everything frozen but LoRA of rank 16 on all attention layers

Hardware: one GPU of 80 GB or more; what was measured of memory is in docs/training.md. It needs one
image on every device: with eight, ``--config.batch_size=8``.
"""

from __future__ import annotations

from sam3_jax.config import rematerialized, sam3
from sam3_jax.data.augment import released
from sam3_jax.trainer.config import TrainConfig
from sam3_jax.training.optimizer import finetuning

VARIANTS = ("masks", "boxes", "lora")


def get_config(variant: str = "masks") -> TrainConfig:
    """The configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"sam3_finetune has no variant {variant!r}: {', '.join(VARIANTS)}")
    config = TrainConfig(output="runs/sam3_finetune", epochs=20.0, batch_size=1)
    config.model = rematerialized(sam3())
    config.optimizer = finetuning()
    config.data.example.augment = released()
    config.data.workers = 2
    masks = variant != "boxes"
    config.loss.masks = config.loss.semantic = masks
    config.data.example.mask_size = 288 if masks else 0
    if variant == "lora":
        config.lora.rank = 16
    config.checkpoint.every = config.validation.every = 200
    config.checkpoint.best = "segm/cgF1" if masks else "bbox/cgF1"
    return config
