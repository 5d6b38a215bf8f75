"""Object prompts of jobs: one object of one picture, by points, a box or a mask."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from sam3_jax.data.images import load_image
from sam3_jax.inference.engine import Engine
from sam3_jax.inference.instances import Kept
from sam3_jax.inference.jobs import Job
from sam3_jax.inference.postprocess import fill_holes
from sam3_jax.inference.prompts import PromptError, click_prompt
from sam3_jax.types import ClickPrompt

MASK_LOGIT = 10.0  # of a mask that is given as a picture: the range that clicks return is +-32


def object_prompt(engine: Engine, job: Job, size: tuple[int, int]) -> ClickPrompt:
    """The prompt of a job on a picture of ``size`` (height, width).

    Raises:
      PromptError: on a prompt that cannot be used.
      ImageError: when the mask cannot be read.
    """
    return click_prompt(
        job.points or None,
        job.point_labels if job.points else None,
        job.object_box,
        job.mask_prompt and read_mask_prompt(job.mask_prompt, size, engine.mask_side),
        size=size,
        frame=engine.config.image_size,
        mask_side=engine.mask_side,
    )


def click_object(engine: Engine, inputs: UInt8[np.ndarray, "1 s s 3"], prompt: ClickPrompt) -> Kept:
    """The object of a prompt as one instance; its box comes from its mask.

    A single point is ambiguous: the best of three hypotheses by the model's own estimate. Anything
    more gets the one mask.
    """
    engine.require("tracker", part="tracker")
    levels = engine.run.tracker_levels(engine.params, engine.trunk(inputs))
    single = (prompt.labels >= 0).sum() == 1 and not prompt.has_mask.any()
    results = engine.run.click(engine.params, levels, prompt)[bool(single)]
    logits, iou = (array[0] for array in jax.device_get(results))
    best = slice(int(iou.argmax()), int(iou.argmax()) + 1)
    return Kept(iou[best], np.zeros((1, 4), np.float32), fill_holes(logits[best]))


def read_mask_prompt(path: Path, size: tuple[int, int], side: int) -> Float[np.ndarray, "s s"]:
    """A picture of a mask, anything but black being the object, -> logits for the prompt.

    Raises:
      ImageError: when it cannot be read.
      PromptError: when it does not have the picture's size or shows nothing.
    """
    inside = read_mask(path, size)
    small = Image.fromarray(np.where(inside, 255, 0).astype(np.uint8))
    share = np.asarray(small.resize((side, side), Image.Resampling.BOX), np.float32) / 255
    return (2 * share - 1) * MASK_LOGIT


def read_mask(path: Path, size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """A picture of a mask, anything but black being the object.

    Raises:
      ImageError: when it cannot be read.
      PromptError: when it does not have the picture's size or shows nothing.
    """
    mask: UInt8[np.ndarray, "h w 3"] = load_image(path)
    if mask.shape[:2] != size:
        raise PromptError(
            f"{path}: the mask has {mask.shape[1]} x {mask.shape[0]} pixels, its picture "
            f"{size[1]} x {size[0]}; give a mask of the picture's size"
        )
    inside = mask.any(axis=2)
    if not inside.any():
        raise PromptError(f"{path}: the mask is empty")
    return inside
