"""Sessions with phrases: births and identities, several phrases, exemplars, refinement, delay."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest

import video_session
from sam3_jax.inference.prompts import PromptError
from sam3_jax.tracking.concepts.config import UNLIMITED
from sam3_jax.video.predictor import VideoPredictor
from video_session import FRAMES, SIZE, clip, follow, same


@pytest.fixture(scope="module")
def predictor():
    return video_session.predictor()


@pytest.fixture(scope="module")
def roomy(predictor):
    """With room for all that phrases find: the limit is of all of them together."""
    concepts = dataclasses.replace(predictor.video.concepts, max_objects=UNLIMITED)
    video = dataclasses.replace(predictor.video, concepts=concepts)
    made = VideoPredictor.from_engine(predictor.engine, video=video)
    # The same programs: compiling is what takes time, and none of them knows the limit.
    made._programs, made._concepts = predictor._programs, predictor._concepts
    return made


def identities(frames) -> set[int]:
    return {i for frame in frames for i in frame.ids.tolist()}


def test_one_phrase(predictor):
    session = predictor.start(clip())
    session.add_text("cat")
    frames = follow(session.propagate())
    assert [f.index for f in frames] == list(range(FRAMES))
    assert identities(frames)
    for frame in frames:
        assert frame.ids.tolist() == sorted(frame.ids.tolist())
        assert frame.masks.shape == (len(frame.ids), *SIZE)
        assert frame.masks.sum(0).max(initial=0) <= 1, "masks of a phrase share no pixel"
        assert set(frame.phrases) <= {"cat"}
        assert ((frame.tracker_scores >= 0) & (frame.tracker_scores <= 1)).all()
    assert set(session.objects.values()) <= {"cat"}
    same(follow(session.propagate()), frames)


def test_results_wait_so_that_nothing_shown_is_taken_back(predictor):
    """What hotstart removes is never shown, or, without waiting, for a while."""
    late, early = predictor.start(clip()), predictor.start(clip(), delay=0)
    seen = []
    for session in (late, early):
        session.add_text("cat")
        frames = []
        for frame in session.propagate():
            behind = session.position - frame.index
            assert behind == session.delay or session.position == FRAMES - 1
            frames.append(frame)
        seen.append(identities(frames))
    assert (late.delay, early.delay) == (3, 0)
    assert seen[0] < seen[1], "the test needs something that hotstart removes"


@pytest.mark.slow
def test_a_phrase_does_not_depend_on_company(roomy):
    """Two in one pass are each what it is alone; only the numbers of its objects differ."""
    both = roomy.start(clip())
    both.add_text("cat")
    both.add_text("blue square")
    together = follow(both.propagate())
    for phrase in ("cat", "blue square"):
        session = roomy.start(clip())
        session.add_text(phrase)
        numbers: dict[int, int] = {}
        for one, many in zip(follow(session.propagate()), together, strict=True):
            own = [i for i, p in enumerate(many.phrases) if p == phrase]
            assert len(own) == len(one.ids), f"{phrase}, frame {one.index}"
            for i, theirs in zip(own, one.ids.tolist(), strict=True):
                assert numbers.setdefault(theirs, int(many.ids[i])) == many.ids[i]
            # Batches are other programs, which add in another order.
            np.testing.assert_allclose(many.tracker_scores[own], one.tracker_scores, atol=1e-4)
            assert (many.masks[own] ^ one.masks).mean() < 1e-3 if own else True
    assert set(itertools.chain(*(f.phrases for f in together))) == {"cat", "blue square"}


def test_boxes_alone_and_exemplars(predictor):
    session = predictor.start(clip())
    with pytest.raises(PromptError, match="empty"):
        session.add_text(None)
    with pytest.raises(ValueError, match="both boxes and frame"):
        session.add_text("cat", boxes=[[1, 2, 30, 40]])
    with pytest.raises(PromptError, match="lies outside"):
        session.add_text("cat", boxes=[[200, 200, 300, 300]], frame=0)
    session.add_text(None, boxes=[[4, 4, 40, 40]], frame=2)
    frames = follow(session.propagate())
    assert not identities(frames[:2])
    born = set(frames[2].ids.tolist())
    assert born
    table = session._timeline.tracking.table
    assert set(table.born[table.live].tolist()) == {2}, "found on their frame only"
    assert set(frames[2].phrases) == {"visual"}
    session.add_text("cat", boxes=[[4, 4, 40, 40], [50, 20, 70, 60]], labels=[1, 0], frame=1)
    assert set(itertools.chain(*(f.phrases for f in follow(session.propagate())))) == {
        "visual",
        "cat",
    }


def test_refinement_of_what_a_phrase_found(predictor):
    session = predictor.start(clip())
    session.add_text("cat")
    before = follow(session.propagate())
    chosen = int(before[-1].ids[0])
    birth = min(f.index for f in before if chosen in f.ids)
    frame = min(birth + 2, FRAMES - 2)
    assert session.add_points(frame, [[30, 30]], object_id=chosen) == chosen
    after = follow(session.propagate(frame))
    assert after[0].index == frame
    at = after[0].ids.tolist().index(chosen)
    assert after[0].scores[at] == 1
    old = before[frame]
    assert not np.array_equal(after[0].masks[at], old.masks[old.ids.tolist().index(chosen)])
    # A whole new pass gives the same identities, and comes to the same prompt.
    again = follow(session.propagate())
    assert identities(again[:frame]) == identities(before[:frame])
    np.testing.assert_array_equal(again[frame].ids, after[0].ids)
    np.testing.assert_array_equal(again[frame].masks, after[0].masks)


def test_clicked_objects_beside_phrases(predictor):
    session = predictor.start(clip())
    own = session.add_points(0, [[40, 20]])
    session.add_text("cat")
    frames = follow(session.propagate())
    assert own == 0
    assert {p for f in frames for i, p in zip(f.ids, f.phrases, strict=True) if i == own} == {""}
    found = identities(frames) - {own}
    assert min(found) >= 1
    late = session.add_points(3, [[60, 40]])
    assert late == 1_000_000
    again = follow(session.propagate())
    assert identities(again) - {late} == identities(frames)
    assert session.objects[late] == ""


def test_what_was_removed_stays_away(predictor):
    """Its phrase finds it as before, so it is followed on, unseen."""
    session = predictor.start(clip())
    session.add_text("cat")
    before = follow(session.propagate())
    gone = int(before[-1].ids[0])
    session.remove(gone)
    assert gone not in session.objects
    with pytest.raises(KeyError, match=f"object {gone} was removed"):
        session.remove(gone)
    after = follow(session.propagate())
    assert identities(after) == identities(before) - {gone}
    for frame, old in zip(after, before, strict=True):
        assert set(old.ids.tolist()) - {gone} <= set(frame.ids.tolist())
    # In the middle of a pass, of frames that wait as well.
    early = predictor.start(clip())
    early.add_text("cat")
    running = early.propagate()
    first = next(running)
    early.remove(gone)
    assert identities([first, *running]) <= {*identities(after), *first.ids.tolist()}
    assert gone not in identities(follow(early.propagate()))


def test_another_phrase_begins_with_new_numbers(roomy):
    """What was said about objects that a phrase had found is about nobody in the next pass."""
    session = roomy.start(clip())
    session.add_text("cat")
    before = follow(session.propagate())
    chosen = int(before[-1].ids[0])
    session.add_points(FRAMES - 2, [[30, 30]], object_id=chosen)
    highest = session._timeline.next_id
    assert max(identities(before)) < highest
    session.add_text("blue square")
    own = session.add_points(0, [[40, 20]])
    after = follow(session.propagate())
    assert own == highest
    assert min(identities(after)) >= highest
    cats = [[i for i, p in zip(f.ids, f.phrases, strict=True) if p == "cat"] for f in after]
    assert all(frame.scores[frame.ids != own].max(initial=0) < 1 for frame in after)
    assert [len(ids) for ids in cats] == [len(frame.ids) for frame in before]


def test_a_pass_that_was_left_goes_on(predictor):
    """Frames that waited to be shown are shown first."""
    for make in (clip, lambda: iter(clip())):
        whole, left = predictor.start(make()), predictor.start(make())
        for session in (whole, left):
            session.add_text("cat")
        expected = follow(whole.propagate())
        found = follow(itertools.islice(left.propagate(), 2))
        assert left.position == 1 + left.delay
        found += follow(left.propagate(left.position + 1))
        same(found, expected)


def test_backwards(predictor):
    session = predictor.start(clip())
    session.add_text("cat")
    frames = follow(session.propagate(backward=True))
    assert [f.index for f in frames] == list(range(FRAMES))[::-1]
    assert identities(frames)
    ahead = follow(session.propagate(0, 3))
    assert [f.index for f in ahead] == [0, 1, 2]


def test_streams_and_missing_frames(predictor):
    """A stream gives what a video gives, as long as it lasts; a lost frame is written down."""
    video, stream = predictor.start(clip()), predictor.start(iter(clip()))
    for session in (video, stream):
        session.add_text("cat")
    # Of a video of 10 frames fewer pointers are read, so compare what precedes that.
    ahead, expected = follow(stream.propagate()), follow(video.propagate())
    assert [f.index for f in ahead] == [f.index for f in expected]
    np.testing.assert_array_equal(ahead[0].ids, expected[0].ids)
    np.testing.assert_array_equal(ahead[0].masks, expected[0].masks)
    lost = list(clip())
    lost[4] = None
    session = predictor.start(iter(lost))
    session.add_text("cat")
    frames = follow(session.propagate())
    assert "no picture" in frames[4].error
    assert len(frames[4].ids) == 0
    assert [f.index for f in frames] == list(range(FRAMES))


def test_saved_sessions_go_on(predictor, tmp_path):
    session = predictor.start(clip())
    session.add_text("cat", boxes=[[4, 4, 40, 40]], labels=[1], frame=5)
    session.add_points(0, [[40, 20]])
    follow(session.propagate(stop=5))
    session.save(tmp_path / "session.npz")
    copy = predictor.restore(tmp_path / "session.npz", clip())
    assert copy.objects == session.objects
    same(follow(copy.propagate(5)), follow(session.propagate(5)))


def test_a_saved_stream_goes_on_with_the_next_frame(predictor, tmp_path):
    frames = list(clip())
    session = predictor.start(iter(frames))
    session.add_text("cat")
    session.add_points(0, [[40, 20]])
    follow(itertools.islice(session.propagate(), 3))
    here = session.position
    session.save(tmp_path / "camera.npz")
    copy = predictor.restore(tmp_path / "camera.npz", iter(frames[here + 1 :]))
    copy.add_points(here + 1, [[60, 40]])
    rest = follow(copy.propagate())
    assert [f.index for f in rest] == list(range(here + 1, FRAMES))
    assert 0 in identities(rest)
    assert 1_000_000 in identities(rest)


def test_memory_is_flat_and_nothing_compiles(predictor):
    first = predictor.start(itertools.cycle(clip()))
    first.add_text("cat")
    follow(itertools.islice(first.propagate(), 12))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    session = predictor.start(itertools.cycle(clip()))
    session.add_text("cat")
    sizes, ids = set(), set()
    for frame in itertools.islice(session.propagate(), 40):
        ids |= set(frame.ids.tolist())
        if frame.index > 10:
            sizes.add((session.state_bytes, sum(a.nbytes for a in jax.live_arrays())))
    assert len({state for state, _ in sizes}) == 1
    # A frame more or less waits while hotstart decides.
    assert max(live for _, live in sizes) < 1.2 * min(live for _, live in sizes)
    assert compiled == []
