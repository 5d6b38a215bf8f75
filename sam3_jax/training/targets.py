"""What the detector is trained towards, and the constants of its loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Shaped


class Targets(NamedTuple):
    """What P prompts should have found, padded to N targets each.

    ``boxes`` are (cx, cy, w, h) fractions. ``masks`` and ``semantic`` (the union of all instances)
    have the size at which masks are compared, boolean or 0..1; without mask losses it may be 0 x 0.
    ``valid``: not padding; ``mask_valid``: has a mask. ``exhaustive``: every instance is annotated
    (read by ``LossConfig.weak``). ``prompt_valid``: not a filler of the batch.
    """

    boxes: Float[Array, "p n 4"]
    valid: Bool[Array, "p n"]
    masks: Shaped[Array, "p n h w"]
    mask_valid: Bool[Array, "p n"]
    semantic: Shaped[Array, "p h w"]
    exhaustive: Bool[Array, " p"]
    prompt_valid: Bool[Array, " p"]


@dataclass
class LossConfig:
    """Constants of :func:`detection_loss`; the defaults are the released fine-tuning recipe's
    variant with masks (``configs/roboflow_v100``). That file trains without: ``masks=False``,
    ``semantic=False``.
    """

    class_weight: float = 20.0  # pretraining: 100
    presence_weight: float = 20.0
    box_weight: float = 5.0
    giou_weight: float = 2.0
    mask_weight: float = 200.0
    dice_weight: float = 10.0
    semantic_weight: float = 20.0
    semantic_dice_weight: float = 30.0
    o2m_weight: float = 2.0  # on all terms of the one-to-many queries
    masks: bool = True
    semantic: bool = True
    scale_by_prompts: bool = True  # total x sqrt(image-phrase pairs on a replica)

    match_class: float = 2.0
    match_box: float = 5.0
    match_giou: float = 2.0
    match_alpha: float = 0.25
    match_gamma: float = 2.0
    o2m_alpha: float = 0.3
    o2m_threshold: float = 0.4
    o2m_topk: int = 4
    o2m_matcher_on_aux: bool = False

    class_alpha: float = 0.25
    class_gamma: float = 2.0
    class_floor: float = 0.01
    class_pos_weight: float = 10.0
    pad_queries: int = 200  # fewer queries are averaged as if there were so many
    weak: bool = False  # no negatives for prompts that are not annotated exhaustively
    presence_alpha: float = 0.5
    presence_gamma: float = 0.0

    mask_alpha: float = 0.25
    mask_gamma: float = 2.0
    mask_points: int = 0  # 0: compare at the target's size; the overview's 12544 points
    mask_oversample: float = 3.0
    mask_importance: float = 0.75
    mask_chunk: int = 8  # pairs of an image that are compared at a time
    max_pairs: int = 256  # pairs of an image and kind of query; the others are drawn out
    semantic_alpha: float = 0.6
    semantic_gamma: float = 2.0
