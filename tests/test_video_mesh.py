"""A session's objects and frames over eight fake devices: what one device gives."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import tiny_predictor
import video_session
from sam3_jax.sharding import batch_sharding, make_mesh
from sam3_jax.tracking.config import TrackerConfig
from sam3_jax.video.config import VideoConfig
from sam3_jax.video.display import VideoFrame
from sam3_jax.video.predictor import VideoPredictor
from video_session import CONCEPTS, clip, follow

DEVICES = 8
RULES = VideoConfig(
    TrackerConfig(bucket_size=DEVICES),
    dataclasses.replace(CONCEPTS, max_objects=12),
    snapshot_every=3,
)


def close(found: list[VideoFrame], expected: list[VideoFrame]) -> None:
    """Equal identities, and what another order of float32 sums leaves of equal numbers."""
    assert [f.index for f in found] == [f.index for f in expected]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        assert a.phrases == b.phrases
        np.testing.assert_allclose(a.tracker_scores, b.tracker_scores, atol=1e-4)
        # Logits close to 0 may fall on either side.
        assert (a.masks ^ b.masks).mean() < 1e-3 if len(a.ids) else True


def asked(predictor: VideoPredictor, tmp_path) -> list[VideoFrame]:
    """Clicks on more objects than a bucket holds, a correction in the past, then a phrase."""
    session = predictor.start(clip())
    ids = [session.add_points(i % 2, [[6 * i + 4, 5 * i + 4]]) for i in range(DEVICES + 1)]
    frames = follow(session.propagate())
    session.add_points(4, [[20, 20]], object_id=ids[0])
    session.remove(ids[1])
    frames += follow(session.propagate(4, 8))
    session.save(tmp_path / "session.npz")
    frames += follow(predictor.restore(tmp_path / "session.npz", clip()).propagate(8))
    if predictor.engine.mesh is not None:
        rows = batch_sharding(predictor.engine.mesh)
        for leaf in jax.tree.leaves(session._timeline.tracking.buckets.states):
            assert leaf.sharding.is_equivalent_to(rows, leaf.ndim)
    session = predictor.start(clip())
    session.add_points(2, [[40, 20]])
    session.add_text("cat")
    return frames + follow(session.propagate())


@pytest.mark.slow
def test_a_session_over_eight_devices(tmp_path):
    made = video_session.params(), tiny_predictor.config()
    one = VideoPredictor(*made, dtype="float32", video=RULES)
    many = VideoPredictor(*made, dtype="float32", video=RULES, mesh=make_mesh(DEVICES))
    expected = asked(one, tmp_path)
    many.warm_up()
    own = many._programs
    # (Not `memorize`: prompts of one frame in several buckets are masks of another size.)
    warm = [program.__wrapped__ for program in (own.propagate, own.memorize_concept, own.track)]
    sizes = [program._cache_size() for program in warm]
    close(asked(many, tmp_path), expected)
    assert min(sizes) > 0
    assert [program._cache_size() for program in warm] == sizes  # nothing that it left out
    assert {p for f in expected for p in f.phrases} == {"", "cat"}
    # The same again: every program has its shardings, nothing compiles anew.
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    close(asked(many, tmp_path), expected)
    assert compiled == []


def test_a_bucket_that_devices_cannot_share():
    rules = VideoConfig(TrackerConfig(bucket_size=12))
    made = video_session.params(), tiny_predictor.config()
    with pytest.raises(ValueError, match=r"bucket_size=12.*8 devices.*take 16"):
        VideoPredictor(*made, dtype="float32", video=rules, mesh=make_mesh(DEVICES))
