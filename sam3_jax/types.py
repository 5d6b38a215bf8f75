"""Array containers that cross module boundaries.

NamedTuples, so that they are pytrees with names. Batch first, channels last; masks are boolean
with True = valid; ``B`` images, ``T`` texts, ``P`` prompts (one image-text-geometry pair each),
``Q`` queries, ``L`` decoder layers.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

Levels = tuple[Float[Array, "_ _ _ _"], ...]  # pyramid of (batch, height, width, dim), finest first


class ImageFeatures(NamedTuple):
    """What ``encode_image`` keeps of a batch of images.

    ``detector`` and ``tracker`` are pyramids of strides 14/4, 14/2, 14 (released: sides 288, 144,
    72); one that was not asked for is an empty tuple.
    """

    trunk: Float[Array, "b h w c"]
    detector: Levels
    tracker: Levels


class TextFeatures(NamedTuple):
    """Encoded phrases. They do not depend on the image and can be reused."""

    tokens: Float[Array, "t n d"]
    mask: Bool[Array, "t n"]


class Geometry(NamedTuple):
    """Geometric part of a concept prompt, padded; every kind may have length 0.

    Coordinates are fractions of the image side: points (x, y), boxes (cx, cy, w, h). Labels: 1
    positive, 0 negative. ``masks`` has values 0..1 at any resolution.
    """

    points: Float[Array, "p np 2"]
    point_labels: Int[Array, "p np"]
    point_mask: Bool[Array, "p np"]
    boxes: Float[Array, "p nb 4"]
    box_labels: Int[Array, "p nb"]
    box_mask: Bool[Array, "p nb"]
    masks: Float[Array, "p nm mh mw"]
    mask_labels: Int[Array, "p nm"]
    mask_mask: Bool[Array, "p nm"]


class DecoderOutput(NamedTuple):
    """Outputs of all decoder layers, last layer last. Boxes are (cx, cy, w, h) fractions.

    With DAC the query axis holds the one-to-one queries first, their one-to-many copies after.
    """

    queries: Float[Array, "l p q d"]  # normalised states, what the heads read
    boxes: Float[Array, "l p q 4"]
    presence_logits: Float[Array, "l p"]


class GroundOutput(NamedTuple):
    """What ``ground`` gives for P prompts, before any threshold.

    ``pred_logits`` do not contain presence; ``pred_masks`` and ``semantic_seg`` are logits at the
    finest pyramid level. ``layer_*`` hold every decoder layer (for losses); with DAC their query
    axis, and that of ``pred_masks``, is 2Q long and the others hold the first Q.
    """

    pred_logits: Float[Array, "p q"]
    pred_boxes: Float[Array, "p q 4"]
    presence_logits: Float[Array, " p"]
    pred_masks: Float[Array, "p qm h w"]
    semantic_seg: Float[Array, "p h w"]
    memory: Float[Array, "p n d"]
    layer_logits: Float[Array, "l p qa"]
    layer_boxes: Float[Array, "l p qa 4"]
    layer_presence: Float[Array, "l p"]


class ClickPrompt(NamedTuple):
    """Prompts of the interactive head, padded.

    Points are pixels of the model's input frame (released: 0..1008), (x, y). Labels: 1 positive,
    0 negative, 2 and 3 the corners of a box, -1 the learned "not a point", -2 padding (never
    attended). A prompt whose points are all padding has no point tokens at all; otherwise one
    "not a point" is appended, as upstream does. ``mask_input`` holds logits at the finest level's
    side; prompts with ``has_mask`` False ignore it.
    """

    points: Float[Array, "p n 2"]
    labels: Int[Array, "p n"]
    mask_input: Float[Array, "p h w"]
    has_mask: Bool[Array, " p"]


class ClickOutput(NamedTuple):
    """All mask hypotheses of the SAM decoder: 0 is the single mask, 1..3 the multimasks."""

    masks: Float[Array, "p m h w"]  # logits
    iou: Float[Array, "p m"]
    object_logits: Float[Array, " p"]
    tokens: Float[Array, "p m d"]
