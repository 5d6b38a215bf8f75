"""Sessions with clicked objects: prompts, corrections, going back, streams, errors."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

import video_session
from sam3_jax.inference.prompts import PromptError
from sam3_jax.tracking.config import TrackerConfig
from sam3_jax.video.config import VideoConfig
from sam3_jax.video.frames import VideoError
from sam3_jax.video.predictor import VideoPredictor
from video_session import FRAMES, SIZE, clip, follow, same

POINT, BOX = [[40, 20]], [10, 8, 40, 40]


@pytest.fixture(scope="module")
def predictor():
    return video_session.predictor()


def test_two_objects_forwards_and_what_a_frame_says(predictor):
    session = predictor.start(clip(), fps=10)
    with pytest.raises(ValueError, match="nothing to follow"):
        session.propagate()
    one, two = session.add_points(0, POINT), session.add_box(2, BOX)
    assert (one, two, session.objects) == (0, 1, {0: "", 1: ""})
    frames = follow(session.propagate())
    assert [f.index for f in frames] == list(range(FRAMES))
    assert [f.time for f in frames] == pytest.approx(np.arange(FRAMES) / 10)
    shown = {i for f in frames for i in f.ids.tolist()}
    assert shown == {one, two}
    for frame in frames:
        assert frame.masks.shape == (len(frame.ids), *SIZE)
        assert frame.masks.dtype == bool
        assert frame.phrases == ("",) * len(frame.ids)
        for mask, box in zip(frame.masks, frame.boxes, strict=True):
            y, x = np.nonzero(mask)
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
        np.testing.assert_array_equal(frame.scores, 1)
    assert session.position == FRAMES - 1
    assert session.state_bytes == predictor.state_bytes(2).session


def test_a_pass_in_pieces_is_the_pass(predictor):
    whole, pieces = (predictor.start(clip()) for _ in range(2))
    for session in (whole, pieces):
        session.add_points(1, POINT)
    expected = follow(whole.propagate())
    assert expected[0].index == 1
    found = follow(pieces.propagate(stop=4))
    found += follow(pieces.propagate(4, 7)) + follow(pieces.propagate(7))
    same(found, expected)
    # Any frame again: from the snapshot before it, silently, to the same result.
    same(follow(pieces.propagate(5, 8)), expected[4:7])
    assert pieces.snapshot_bytes > 0


def test_snapshots_change_nothing(predictor):
    """Without any, going back begins at the pass's first frame."""
    results = []
    for other in (predictor, video_session.predictor(snapshot_bytes=0)):
        session = other.start(clip())
        one = session.add_points(0, POINT)
        follow(session.propagate())
        session.add_points(6, [[30, 30]], object_id=one)
        results.append(follow(session.propagate(6)))
        assert (session.snapshot_bytes == 0) == (other is not predictor)
    same(*results)


def test_a_correction_in_the_past(predictor):
    session = predictor.start(clip())
    one, two = session.add_points(0, POINT), session.add_points(0, [[60, 40]])
    before = follow(session.propagate())
    assert session.add_points(5, [[20, 20]], [1], object_id=one) == one
    after = follow(session.propagate(5))
    assert after[0].index == 5
    assert session.add_points(5, [[20, 20]], [1], object_id=one) == one  # once more, refined
    refined = follow(session.propagate(5))
    index = [f.index for f in before].index(5)
    assert any(
        not np.array_equal(a.masks, b.masks) for a, b in zip(after, before[index:], strict=True)
    )
    # The other object never notices: selection is by an object's own scores. (Up to rounding: the
    # program that reads more prompted frames adds in another order.)
    for frames in (after, refined):
        for a, b in zip(frames, before[index:], strict=True):
            np.testing.assert_allclose(
                a.tracker_scores[a.ids == two], b.tracker_scores[b.ids == two], atol=1e-6
            )
    # A whole new pass knows both prompts.
    again = follow(session.propagate())
    assert [f.index for f in again] == list(range(FRAMES))
    np.testing.assert_array_equal(again[5].masks, refined[0].masks)


def test_backwards_and_both_ways(predictor):
    session = predictor.start(clip())
    session.add_points(5, POINT)
    back = follow(session.propagate(backward=True))
    assert [f.index for f in back] == [5, 4, 3, 2, 1, 0]
    ahead = follow(session.propagate(5))
    np.testing.assert_array_equal(ahead[0].masks, back[0].masks)
    alone = predictor.start(clip())
    alone.add_points(5, POINT)
    same(follow(alone.propagate()), ahead)
    same(follow(alone.propagate(5, 2, backward=True)), back[:3])


def test_masks_take_pixels_from_earlier_ones(predictor):
    session = predictor.start(clip())
    masks = np.zeros((2, *SIZE), bool)
    masks[0, 8:40, 8:48], masks[1, 16:48, 24:72] = True, True
    ids = [session.add_mask(0, mask) for mask in masks]
    (frame,) = follow(session.propagate(0, 1))
    assert frame.ids.tolist() == ids
    expected = np.stack([masks[0] & ~masks[1], masks[1]])
    # At an eighth of the model's side a mask's edge is off by a few pixels.
    assert (frame.masks ^ expected).mean() < 0.05
    assert not (frame.masks[0] & frame.masks[1]).mean() > 0.02


def test_removal(predictor):
    session = predictor.start(clip())
    one, two = session.add_points(0, POINT), session.add_points(0, [[60, 40]])
    follow(session.propagate(stop=4))
    session.remove(one)
    assert session.objects == {two: ""}
    rest = follow(session.propagate())
    assert {i for f in rest for i in f.ids.tolist()} <= {two}
    with pytest.raises(KeyError, match="object 0 was removed; tracked now: 1"):
        session.remove(one)
    with pytest.raises(KeyError, match="object 0 was removed"):
        session.add_points(2, POINT, object_id=one)
    session.remove(two)
    with pytest.raises(ValueError, match="nothing to follow"):
        session.propagate()
    assert session.add_points(3, POINT) == 2, "identities are not used again"


def test_bad_input(predictor):
    session = predictor.start(clip())
    with pytest.raises(VideoError, match="no frame 99"):
        session.add_points(99, POINT)
    with pytest.raises(KeyError, match="no object 7"):
        session.add_points(0, POINT, object_id=7)
    with pytest.raises(PromptError, match="must lie on the image"):
        session.add_points(0, [[900, 3]])
    with pytest.raises(PromptError, match="a mask must be"):
        session.add_mask(0, np.zeros((4, 4), bool))
    assert session.objects == {}, "a prompt that fails leaves nothing behind"
    session.add_points(0, POINT)
    with pytest.raises(VideoError, match="no frame -1"):
        session.propagate(-1)
    with pytest.raises(ValueError, match="delay must be"):
        predictor.start(clip(), delay=-1)
    with pytest.raises(ValueError, match=r"default, sam3, sam3\.1"):
        type(predictor).from_engine(predictor.engine, video="sam2")


def test_of_many_points_the_first_and_last_count(predictor):
    points = [[4 * i + 2, 3 * i + 2] for i in range(19)]
    masks = []
    for given in (points, points[:8] + points[-8:], points[:16]):
        session = predictor.start(clip())
        session.add_points(0, given)
        (frame,) = follow(session.propagate(0, 1))
        masks.append(frame.masks)
    np.testing.assert_array_equal(masks[0], masks[1])
    assert not np.array_equal(masks[0], masks[2])


def test_a_correction_of_the_frame_just_shown_counts_from_the_next_on(predictor):
    """Without leaving the pass: a stream has no other way."""
    results = []
    for video in (clip(), iter(clip())):
        session = predictor.start(video)
        one = session.add_points(0, POINT)
        frames = []
        for frame in session.propagate():
            frames.append(frame)
            if frame.index == 4:
                session.add_points(4, [[20, 20]], object_id=one)
        results.append(frames)
    left = predictor.start(clip())
    one = left.add_points(0, POINT)
    expected = follow(left.propagate(stop=5))
    left.add_points(4, [[20, 20]], object_id=one)
    expected += follow(left.propagate(5))
    same(results[0], expected)
    # Of a stream all pointers of the last frames are read, of a video of 10 frames fewer.
    untouched = predictor.start(iter(clip()))
    untouched.add_points(0, POINT)
    for frames, others in ((results[0], None), (results[1], follow(untouched.propagate()))):
        if others is not None:
            same(frames[:5], others[:5])
            assert not np.array_equal(frames[5].tracker_scores, others[5].tracker_scores)


def test_a_pass_ends_where_a_correction_goes_elsewhere(predictor):
    session = predictor.start(clip())
    one = session.add_points(0, POINT)
    running = session.propagate()
    follow(itertools.islice(running, 6))
    session.add_points(2, [[20, 20]], object_id=one)
    with pytest.raises(VideoError, match="gone to another frame"):
        next(running)
    assert [f.index for f in session.propagate(2)] == list(range(2, FRAMES))


def test_snapshots_keep_to_their_limit(predictor):
    session = predictor.start(clip())
    session.add_points(0, POINT)
    follow(session.propagate())
    one = session.snapshot_bytes // 4  # after frames 0, 3, 6 and 9
    for room, kept in ((2 * one, 2), (one - 1, 0)):
        other = video_session.predictor(snapshot_bytes=room).start(clip())
        other.add_points(0, POINT)
        for _ in other.propagate():
            assert other.snapshot_bytes <= room
        assert other.snapshot_bytes in range(kept // 2 * one, kept * one + 1)


def test_a_frame_that_is_missing(predictor):
    frames = list(clip())
    frames[3] = None
    session = predictor.start(iter(frames))
    session.add_points(0, POINT)
    found = follow(session.propagate())
    assert len(found) == FRAMES
    assert "no picture" in found[3].error
    assert len(found[3].ids) == 0
    assert found[3].masks.shape == (0, *SIZE)
    assert all(f.error is None for f in found if f.index != 3)
    stored = np.asarray(session._timeline.tracking.buckets.states[0].map_frames)[0]
    assert 3 not in stored
    assert 2 in stored or 4 in stored


def test_a_stream_goes_one_way(predictor):
    session = predictor.start(itertools.cycle(clip()))  # endless
    one = session.add_points(0, POINT)
    frames = follow(itertools.islice(session.propagate(), 5))
    assert [f.index for f in frames] == [0, 1, 2, 3, 4]
    whole = predictor.start(clip())
    whole.add_points(0, POINT)
    with pytest.raises(VideoError, match="is gone"):
        session.add_points(1, POINT)
    with pytest.raises(VideoError, match="has not come yet"):
        session.add_points(30, POINT)
    with pytest.raises(VideoError, match="backwards"):
        session.propagate(backward=True)
    with pytest.raises(VideoError, match="is gone"):
        follow(session.propagate(2))
    session.add_points(4, [[20, 20]], object_id=one)  # the last one can be corrected
    two = session.add_points(5, [[60, 40]])  # and the next one prompted
    rest = follow(itertools.islice(session.propagate(), 4))
    assert [f.index for f in rest] == [5, 6, 7, 8]
    assert set(session.objects) == {one, two}


def test_saved_sessions_go_on(predictor, tmp_path):
    session = predictor.start(clip())
    one = session.add_points(0, POINT)
    session.add_mask(2, clip()[0, :, :, 0] > 128)
    follow(session.propagate(stop=4))
    path = tmp_path / "session.npz"
    session.save(path)
    copy = predictor.restore(path, clip())
    assert copy.objects == session.objects
    same(follow(copy.propagate(4)), follow(session.propagate(4)))
    for either in (copy, session):
        either.add_points(2, [[20, 20]], object_id=one)
    same(follow(copy.propagate(2)), follow(session.propagate(2)))
    with pytest.raises(ValueError, match="another video frames"):
        predictor.restore(path, clip()[:4])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a saved session"):
        predictor.restore(path, clip())
    with pytest.raises(ValueError, match="no such file"):
        predictor.restore(tmp_path / "none.npz", clip())


def test_objects_come_and_go_without_compiling(predictor):
    """More than a bucket of them, on two videos' worth of frames."""

    def live(session, count: int) -> list[int]:
        ids = [session.add_points(0, [[4 * i % 60 + 2, 3 * i % 40 + 2]]) for i in range(count)]
        follow(session.propagate(stop=3))
        for i in ids[::2]:
            session.remove(i)
        session.add_points(2, POINT, object_id=ids[1])
        follow(session.propagate(2, 5))
        follow(session.propagate(4, backward=True))
        return ids

    live(predictor.start(clip()), 6)  # a bucket has 4 slots
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    session = predictor.start(clip())
    live(session, 8)
    assert compiled == []
    assert session.state_bytes == predictor.state_bytes(8).session


@pytest.mark.slow
def test_company_may_be_in_other_buckets(predictor):
    """Prompts that overlap, and a frame's score for all objects: buckets of 2 and of 8 agree."""
    results = []
    for size in (2, 8):
        rules = VideoConfig(TrackerConfig(bucket_size=size, selection="session"))
        assert rules.tracker.non_overlapping_prompts
        other = VideoPredictor.from_engine(predictor.engine, video=rules)
        session = other.start(clip())
        for number in range(5):
            session.add_points(0, [[24 + 6 * number, 20 + 5 * number]])
        first = follow(session.propagate(0, 4))
        session.add_points(2, [[30, 30]], object_id=1)
        results.append(first + follow(session.propagate(2)))
    found, expected = results
    assert len(found) > FRAMES
    for one, other in zip(found, expected, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        # Batches of other sizes round otherwise, which may move a mask's edge.
        differing = (one.masks != other.masks).sum((1, 2))
        assert (differing <= 0.002 * np.prod(SIZE)).all(), f"frame {one.index}: {differing}"
