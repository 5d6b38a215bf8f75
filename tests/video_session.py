"""Sessions on a toy model with random weights, shared by the tests of a process."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import jax
import numpy as np

import tiny_predictor
from sam3_jax.tracking.concepts.config import ConceptConfig
from sam3_jax.tracking.config import TrackerConfig
from sam3_jax.video.config import VideoConfig
from sam3_jax.video.display import VideoFrame
from sam3_jax.video.predictor import VideoPredictor

FRAMES, SIZE = 10, (64, 80)
# Random weights find everything with a probability of a few percent, and large.
CONCEPTS = ConceptConfig(
    detection_score=0.04,
    nms_overlap=0.4,
    match_overlap=0.25,
    track_overlap=0.25,
    new_score=0.05,
    hotstart=4,
    hotstart_unmatched=3,
    hotstart_duplicate=3,
    max_objects=16,
    recondition_every=4,
    recondition_score=0.05,
    recondition_overlap=0.5,
    recondition_logit=0.0,
    recondition_together=False,
)


@functools.cache
def clip() -> np.ndarray:
    """Noise in blocks that drifts."""
    blocks = np.random.default_rng(1).integers(0, 255, (14, 14, 3)).astype(np.uint8)
    picture = blocks.repeat(8, 0).repeat(8, 1)
    return np.stack([picture[t : t + SIZE[0], 2 * t : 2 * t + SIZE[1]] for t in range(FRAMES)])


@functools.cache
def predictor(*, snapshot_bytes: int = 1 << 30) -> VideoPredictor:
    """Buckets of 4 objects; a snapshot every 3 frames."""
    rules = VideoConfig(
        TrackerConfig(bucket_size=4), CONCEPTS, snapshot_every=3, snapshot_bytes=snapshot_bytes
    )
    if snapshot_bytes == 1 << 30:
        return VideoPredictor(params(), tiny_predictor.config(), dtype="float32", video=rules)
    other = predictor()
    made = VideoPredictor.from_engine(other.engine, video=rules)
    # The same programs: compiling is what takes time.
    made._programs, made._concepts = other._programs, other._concepts
    return made


def params() -> dict:
    """Random weights by which tracked objects mostly are there."""
    made = jax.tree.map(np.array, tiny_predictor.params())
    made["tracker"]["mask_decoder"]["object_head"]["layer_2"]["bias"] += 2.0
    return made


def follow(frames: Iterable[VideoFrame]) -> list[VideoFrame]:
    return list(frames)


def same(found: Sequence[VideoFrame], expected: Sequence[VideoFrame]) -> None:
    """Equal in everything."""
    assert [f.index for f in found] == [f.index for f in expected]
    for a, b in zip(found, expected, strict=True):
        for name, one, other in zip(VideoFrame._fields, a, b, strict=True):
            np.testing.assert_array_equal(one, other, f"{name} of frame {a.index}")
