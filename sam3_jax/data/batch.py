"""Examples as arrays of fixed shapes: what a training step takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from sam3_jax.data.examples import Example, Prompt
from sam3_jax.data.sampling import VISUAL
from sam3_jax.tokenizer import default_tokenizer
from sam3_jax.training.batch import Clicks, TrainBatch
from sam3_jax.training.targets import Targets
from sam3_jax.types import Geometry

NO_BOX = (0.5, 0.5, 1.0, 1.0)  # of padding: as good as any, and far from a division by zero


def collate(
    examples: Sequence[Example],
    *,
    prompts: int,
    exemplars: int,
    buckets: Sequence[int],
    context_length: int = 32,
) -> TrainBatch:
    """Pads and stacks examples.

    Args:
      prompts: of each image; missing ones are fillers whose ``prompt_valid`` is False.
      exemplars: slots for boxes of each prompt.
      buckets: numbers of target slots, ascending; the first that holds the batch is taken.

    Raises:
      ValueError: when a prompt has more targets than the last bucket, or more boxes than slots.
    """
    asked = [p for example in examples for p in _fill(example, prompts)]
    most = max((len(p.boxes) for p in asked if p), default=0)
    if most > buckets[-1]:
        raise ValueError(f"a prompt has {most} targets, the largest bucket is {buckets[-1]}")
    slots = next(bucket for bucket in buckets if bucket >= most)
    side, size = examples[0].image.shape[0], examples[0].prompts[0].semantic.shape
    targets = _no_targets(len(asked), slots, size)
    boxes = np.tile(np.float32(NO_BOX), (len(asked), exemplars, 1))
    labels = np.zeros((len(asked), exemplars), np.int32)
    shown = np.zeros((len(asked), exemplars), bool)
    for row, prompt in enumerate(asked):
        if prompt is None:
            continue
        count, given = len(prompt.boxes), len(prompt.exemplars)
        if given > exemplars:
            raise ValueError(f"a prompt has {given} exemplar boxes, there are {exemplars} slots")
        targets.boxes[row, :count] = to_fractions(prompt.boxes, side)
        targets.valid[row, :count] = True
        targets.masks[row, :count] = prompt.masks
        targets.mask_valid[row, :count] = prompt.mask_valid
        targets.semantic[row] = prompt.semantic
        targets.exhaustive[row] = prompt.exhaustive
        targets.prompt_valid[row] = True
        boxes[row, :given] = to_fractions(prompt.exemplars, side)
        labels[row, :given] = prompt.exemplar_labels
        shown[row, :given] = True
    tokenize = default_tokenizer()
    return TrainBatch(
        np.stack([example.image for example in examples]),
        tokenize([p.phrase if p else VISUAL for p in asked], context_length),
        _boxes_only(boxes, labels, shown),
        targets,
        Clicks(*(np.stack(parts) for parts in zip(*(e.clicks for e in examples), strict=True))),
    )


def pad_targets(batch: TrainBatch, slots: int) -> TrainBatch:
    """The batch with more target slots: all processes of a step must agree on their number.

    Raises:
      ValueError: when the batch has more already.
    """
    targets, have = batch.targets, batch.targets.valid.shape[1]
    if slots < have:
        raise ValueError(f"the batch has {have} target slots, it cannot be padded to {slots}")
    wider = _no_targets(len(targets.valid), slots, targets.masks.shape[2:])
    for name in ("boxes", "valid", "masks", "mask_valid"):
        getattr(wider, name)[:, :have] = getattr(targets, name)
    return batch._replace(
        targets=wider._replace(
            semantic=targets.semantic,
            exhaustive=targets.exhaustive,
            prompt_valid=targets.prompt_valid,
        )
    )


def to_fractions(boxes: Float[np.ndarray, "n 4"], side: int) -> Float[np.ndarray, "n 4"]:
    """(x0, y0, x1, y1) in pixels of a square to (cx, cy, w, h) in fractions of its side."""
    low, high = boxes[:, :2] / side, boxes[:, 2:] / side
    return np.concatenate([(low + high) / 2, high - low], axis=1).astype(np.float32)


def _fill(example: Example, prompts: int) -> list[Prompt | None]:
    if len(example.prompts) > prompts:
        raise ValueError(
            f"an example has {len(example.prompts)} prompts, there are {prompts} slots"
        )
    return [*example.prompts, *[None] * (prompts - len(example.prompts))]


def _no_targets(prompts: int, slots: int, size: tuple[int, ...]) -> Targets:
    return Targets(
        boxes=np.tile(np.float32(NO_BOX), (prompts, slots, 1)),
        valid=np.zeros((prompts, slots), bool),
        masks=np.zeros((prompts, slots, *size), bool),
        mask_valid=np.zeros((prompts, slots), bool),
        semantic=np.zeros((prompts, *size), bool),
        exhaustive=np.zeros(prompts, bool),
        prompt_valid=np.zeros(prompts, bool),
    )


def _boxes_only(boxes: np.ndarray, labels: np.ndarray, shown: np.ndarray) -> Geometry:
    count = len(boxes)
    none = np.zeros((count, 0), np.int32)
    return Geometry(
        points=np.zeros((count, 0, 2), np.float32),
        point_labels=none,
        point_mask=none.astype(bool),
        boxes=boxes,
        box_labels=labels,
        box_mask=shown,
        masks=np.zeros((count, 0, 16, 16), np.float32),
        mask_labels=none,
        mask_mask=none.astype(bool),
    )
