"""Sessions on files that something is wrong with, and passes that are broken off."""

from __future__ import annotations

import threading
import time
import wave

import av
import numpy as np
import pytest

import video_session
from sam3_jax.tracking.concepts.config import sam3_1
from sam3_jax.video.config import VideoConfig
from sam3_jax.video.frames import VideoError
from sam3_jax.video.predictor import VideoPredictor
from video_clips import UNIT, spoil, write_clip, write_two_sizes
from video_session import SIZE, clip, follow, same

POINT, FRAMES = [[40, 20]], 12


@pytest.fixture(scope="module")
def predictor():
    return video_session.predictor()


def tracked(predictor: VideoPredictor, path) -> list:
    session = predictor.start(path)
    session.add_points(0, POINT)
    return follow(session.propagate())


def test_damage_in_the_middle_is_written_down(predictor, tmp_path):
    path = write_clip(tmp_path / "damaged.mp4", FRAMES, size=SIZE, gop=4, options={"bf": "0"})
    clean = tracked(predictor, path)
    missing = spoil(path, [5])
    assert missing == [5]
    session = predictor.start(path)
    one = session.add_points(0, POINT)
    frames = follow(session.propagate())
    assert [f.index for f in frames] == list(range(FRAMES))
    same(frames[:5], clean[:5])  # what was finished stays
    bad = [f.index for f in frames if f.error]
    assert bad[0] == 5
    assert "damaged.mp4, frame 5: " in frames[5].error
    assert len(frames[5].ids) == 0
    assert max(bad) < 8, "the next key frame is good"
    assert frames[-1].ids.tolist() == clean[-1].ids.tolist() == [one]
    with pytest.raises(VideoError, match=r"frame 5 cannot be prompted.*prompt another one"):
        session.add_points(5, POINT)
    # An object of a frame before goes on; the rest of the session is as it was.
    session.add_points(4, [[20, 20]], object_id=one)
    assert [f.index for f in follow(session.propagate(4))] == list(range(4, FRAMES))


def test_a_changing_size(predictor, tmp_path):
    """All frames, and their masks, have the first one's."""
    twice = (2 * SIZE[0], 2 * SIZE[1])
    frames = tracked(predictor, write_two_sizes(tmp_path / "sizes.mkv", [SIZE, twice], 4))
    assert [f.masks.shape[1:] for f in frames] == [SIZE] * 8
    assert all(f.error is None for f in frames)


def test_variable_frame_rate(predictor, tmp_path):
    """Frames keep the times that the file gives them."""
    ticks = [0, 512, 1536, 1600, 4000, 4512]
    path = write_clip(tmp_path / "vfr.mp4", len(ticks), size=SIZE, pts=ticks)
    frames = tracked(predictor, path)
    assert [f.time for f in frames] == pytest.approx([float(t * UNIT) for t in ticks])


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="PyAV before 18")
def test_a_video_that_was_filmed_upright(predictor, tmp_path):
    """Masks, and points, are those of the picture as it is seen."""
    path = tmp_path / "upright.mp4"
    write_clip(path, 4, size=(SIZE[1], SIZE[0]), display=(90, False, False))
    session = predictor.start(path)
    assert session.video.size == SIZE
    session.add_points(0, [[SIZE[1] - 2, SIZE[0] - 2]])
    assert follow(session.propagate())[0].masks.shape[1:] == SIZE


def test_files_without_pictures(predictor, tmp_path):
    sound, empty = tmp_path / "sound.wav", tmp_path / "empty.mp4"
    with wave.open(str(sound), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(800))
    empty.touch()
    nothing = np.zeros((0, *SIZE, 3), np.uint8)
    for video, message in (
        (sound, "sound.wav: .*only sound"),
        (empty, "empty.mp4: .*the file is empty"),
        (nothing, "no readable frame .*give at least one picture"),
        (iter(()), "ended without a readable frame"),
        (tmp_path / "none.mp4", "none.mp4: .*no such file"),
    ):
        with pytest.raises(VideoError, match=message):
            predictor.start(video)


def test_a_loop_that_is_left_and_a_stream_that_fails(predictor):
    """What was seen stays, no thread is left behind, and the session goes on."""
    whole = predictor.start(clip())
    whole.add_points(0, POINT)
    expected = follow(whole.propagate())
    session = predictor.start(clip())
    session.add_points(0, POINT)
    before = threading.active_count()
    found = []

    def watch() -> None:
        for frame in session.propagate():
            found.append(frame)
            if len(found) == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch()
    for _ in range(100):
        if threading.active_count() <= before:
            break
        time.sleep(0.02)
    assert threading.active_count() <= before
    assert session.position == 3
    same(found + follow(session.propagate(4)), expected)

    def camera():
        yield from clip()[:3]
        raise OSError("cable pulled")

    stream = predictor.start(camera())
    one = stream.add_points(0, POINT)
    seen = []
    with pytest.raises(OSError, match="cable pulled"):
        seen.extend(frame.index for frame in stream.propagate())
    assert seen == [0, 1, 2]
    assert stream.objects == {one: ""}


def test_the_last_object_goes_while_frames_come(predictor):
    session = predictor.start(clip())
    one = session.add_points(0, POINT)
    counts = []
    for frame in session.propagate():
        counts.append(len(frame.ids))
        if frame.index == 3:
            session.remove(one)
    assert counts[:4] == [1] * 4
    assert counts[4:] == [0] * (len(clip()) - 4)
    assert session.objects == {}


def test_presets_are_those_of_the_releases():
    """By name; what each rule does is tested where it is."""
    made = video_session.params(), video_session.tiny_predictor.config()
    three, one, plain = (
        VideoPredictor(*made, dtype="float32", video=name) for name in ("sam3", "sam3.1", "default")
    )
    assert three.video.tracker.selection == "session"
    assert three.video.concepts.recondition_together
    assert plain.video == VideoConfig()
    assert plain.video.tracker.selection == one.video.tracker.selection == "object"
    assert one.video.concepts.max_objects == sam3_1().max_objects == 16
    assert one.video.concepts.confirmation
    assert not one.video.concepts.recondition_together
    for predictor in (three, one, plain):
        session = predictor.start(clip())
        session.add_text("cat")
        assert session.delay == 14
