"""Points, boxes and masks of one object -> what the model makes of them, checked."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool

from sam3_jax.inference.prompts import PromptError, Size, Values, click_prompt
from sam3_jax.models.tracker import Tracked
from sam3_jax.tracking.masks import MaskPrompt
from sam3_jax.tracking.prompts import ObjectClicks, pack_clicks
from sam3_jax.types import Levels
from sam3_jax.video.buckets import one_of
from sam3_jax.video.edits import Edit
from sam3_jax.video.tracked import Kit


def ask_clicks(
    kit: Kit,
    levels: Levels,
    points: Values | None,
    labels: Values | None,
    box: Values | None,
    previous: np.ndarray | None,
) -> Tracked:
    """One object by points, a box or both; of more than 16 points the first and last 8 count.

    Args:
      points, labels, box: in pixels of the video; labels 1 (on the object) by default.
      previous: its mask logits on this frame so far.

    Raises:
      PromptError: on a prompt without content or with unusable values.
    """
    side = kit.model.image_size
    checked = click_prompt(
        points, labels, box, None, size=kit.size, frame=side, mask_side=kit.engine.mask_side
    )
    marks = np.asarray(checked.labels[0])
    count = int((marks >= 0).sum())
    given = ObjectClicks(checked.points[0, :count], marks[:count], previous)
    programs, mask_side = kit.programs, (kit.engine.mask_side,) * 2
    clicks = pack_clicks({0: given}, programs.widths[0], mask_side)
    return one_of([programs.prompt(kit.engine.params, levels, clicks)], 0)


def check_mask(mask: np.ndarray, size: Size) -> Bool[np.ndarray, "h w"]:
    """A mask prompt as booleans at the video's size.

    Raises:
      PromptError: on another shape or type.
    """
    mask = np.asarray(mask)
    if mask.shape != size or mask.dtype not in (np.bool_, np.uint8):
        raise PromptError(
            f"a mask must be (height, width) = {size} of bool, got shape {mask.shape} of "
            f"{mask.dtype}"
        )
    return mask > 0


def ask_masks(
    kit: Kit, levels: Levels, masks: dict[int, Bool[np.ndarray, "h w"]], grid: tuple[int, int]
) -> dict[int, Tracked]:
    """Objects of one frame by masks, in the order in which they were given.

    A later mask takes its pixels from earlier ones, however many there are.
    """
    programs, names, size = kit.programs, list(masks), kit.programs.config.bucket_size
    slots = programs.width(min(len(names), size))
    length = -(-len(names) // slots) * slots
    stack = np.zeros((length, *kit.size), bool)
    stack[: len(names)] = list(masks.values())
    given: MaskPrompt = programs.mask_prompt(stack, np.arange(length, dtype=np.int32), grid)
    found: dict[int, Tracked] = {}
    for start in range(0, length, slots):
        here = given
        if length > slots:
            here = kit.concepts.pick(given, np.arange(start, start + slots, dtype=np.int32))
        out = programs.prompt_mask(kit.engine.params, levels, here)
        own = enumerate(names[start : start + slots])
        found |= {name: one_of([out], slot) for slot, name in own}
    return found


def packed(mask: Bool[np.ndarray, "h w"]) -> np.ndarray:
    """A mask as an edit keeps it."""
    return np.packbits(mask)


def unpacked(edit: Edit, size: Size) -> Bool[np.ndarray, "h w"]:
    """The mask of an edit."""
    return np.unpackbits(edit.mask, count=size[0] * size[1]).astype(bool).reshape(size)
