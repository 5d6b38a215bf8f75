"""Frames of videos: exact numbers and times, and what is wrong with a file said or recorded."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
import tracemalloc
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from sam3_jax.video.pictures import natural_key
from sam3_jax.video.prefetch import prefetch
from sam3_jax.video.reader import Frame, VideoError, open_video
from video_clips import (
    SIZE,
    UNIT,
    has_encoder,
    number_in,
    numbered,
    spoil,
    write_clip,
    write_two_sizes,
)

FRAMES = 30
# File -> how it is encoded. Key frames every 10 frames, most with pictures out of order.
KINDS = {
    "h264.mp4": {"codec": "libx264"},
    "open_gop.mp4": {
        "codec": "libx264",
        "options": {"x264-params": "open-gop=1:bframes=3:keyint=10:scenecut=0"},
    },
    "mpeg4.mov": {"codec": "mpeg4"},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2"}, "unit": Fraction(1, 25)},
    "vp8.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "12"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"lag-in-frames": "12"}},
    "lossless.mkv": {"codec": "ffv1"},
    "bare.h264": {"codec": "libx264", "options": {"bf": "0"}},  # without timestamps
    "program.mpg": {"codec": "mpeg2video", "unit": Fraction(1, 25)},  # without an index
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """A folder with a clip of each kind that this ffmpeg can encode."""
    folder = tmp_path_factory.mktemp("clips")
    for name, how in KINDS.items():
        if has_encoder(how["codec"]):
            pixels = "yuv444p" if how["codec"] == "ffv1" else "yuv420p"
            write_clip(folder / name, FRAMES, pixels=pixels, **how)
    return folder


def clip(folder: Path, name: str) -> Path:
    if not (folder / name).exists():
        pytest.skip(f"this ffmpeg cannot encode {KINDS[name]['codec']}")
    return folder / name


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_by_order_and_by_number(clips, name):
    source = open_video(clip(clips, name))
    frames = list(source)
    assert [number_in(frame.image) for frame in frames] == list(range(FRAMES))
    assert [frame.index for frame in frames] == list(range(FRAMES))
    # 1 ms: the unit of WebM. Frame i is shown at i / 25 s, whatever the file's clock starts with.
    np.testing.assert_allclose([f.time for f in frames], np.arange(FRAMES) / 25, atol=1e-3)
    assert source.size == SIZE
    assert source.rate == 25
    assert source.count() == source.length == FRAMES
    assert source.problems == ()
    order = np.random.default_rng(0).permutation(FRAMES).tolist()
    for index in [*order, 11, 12, 13, 0, FRAMES - 1]:
        frame = source.seek(index)
        assert frame[:3] == frames[index][:3]
        np.testing.assert_array_equal(frame.image, frames[index].image)
    assert [number_in(f.image) for f in source.frames(17, 22)] == [17, 18, 19, 20, 21]
    assert [number_in(f.image) for f in source.backwards(20)] == list(range(21))[::-1]
    source.close()


def test_seeking_starts_at_a_key_frame(clips, monkeypatch):
    source = open_video(clip(clips, "h264.mp4"))
    source.count()
    decoded = []
    decode = source._frames._pictures
    pictures = lambda *args: (decoded.append(p.pts) or p for p in decode(*args))  # noqa: E731
    monkeypatch.setattr(source._frames, "_pictures", pictures)
    assert source.seek(25).index == 25
    # From frame 20 on (the encoder may have put a key frame later), not from the beginning.
    assert 1 <= len(decoded) <= 6


def test_colours_follow_the_matrix_that_the_file_states(tmp_path):
    path = tmp_path / "hd.mp4"
    color = np.full((*SIZE, 3), (200, 40, 90), np.uint8)
    for matrix in (1, 5):  # BT.709 and BT.601, as ffmpeg counts them
        with av.open(str(path), "w") as out:
            stream = out.add_stream("libx264", rate=25, options={"crf": "1"})
            stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
            stream.codec_context.colorspace = matrix
            frame = av.VideoFrame.from_ndarray(color, format="rgb24")
            out.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=matrix)))
            out.mux(stream.encode(None))
        # 8-bit YUV and back: 2 steps. The other matrix would be off by more than 10.
        np.testing.assert_allclose(open_video(path).seek(0).image, color, atol=3)


def test_variable_frame_rate_keeps_its_times(tmp_path):
    pts = np.cumsum([0, 512, 512, 1536, 100, 2048, 512, 30, 512, 9000, 512, 512]).tolist()
    path = write_clip(tmp_path / "vfr.mp4", len(pts), pts=pts, options={"bf": "0"})
    source = open_video(path)
    frames = list(source)
    assert [number_in(f.image) for f in frames] == list(range(len(pts)))
    assert [f.pts * source.time_base for f in frames] == [p * UNIT for p in pts]
    assert source.seek(9).time == pytest.approx(float(pts[9] * UNIT), abs=1e-9)


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="PyAV before 18")
@pytest.mark.parametrize("mirror_x", [False, True])
@pytest.mark.parametrize("mirror_y", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
def test_pictures_are_turned_upright(tmp_path, clips, degrees, mirror_x, mirror_y):
    display = (degrees, mirror_x, mirror_y)
    source = open_video(write_clip(tmp_path / "turned.mp4", 3, display=display))
    stored = write_clip(tmp_path / "plain.mp4", 3)
    for frame, plain in zip(source, open_video(stored), strict=True):
        expected = np.rot90(plain.image, degrees // 90)
        expected = expected[:, ::-1] if mirror_x else expected
        expected = expected[::-1] if mirror_y else expected
        np.testing.assert_array_equal(frame.image, expected)
    assert source.size == expected.shape[:2]


def test_damaged_frames_are_missing_and_keep_their_numbers(tmp_path):
    path = write_clip(tmp_path / "damaged.mp4", FRAMES)
    clean = list(open_video(path))
    missing = spoil(path, [13, 28])
    source = open_video(path)
    frames = list(source)
    assert [f.index for f in frames] == list(range(FRAMES))
    assert [f[:3] for f in frames] == [f[:3] for f in clean]
    assert [f.index for f in frames if f.image is None] == missing
    for index in missing:
        assert f"damaged.mp4, frame {index}: " in frames[index].error
    for frame, before in zip(frames[: missing[0]], clean, strict=False):
        np.testing.assert_array_equal(frame.image, before.image)
    assert source.seek(missing[0]).image is None
    assert number_in(source.seek(22).image) == 22  # behind the next key frame
    assert source.count() == FRAMES


def test_a_damaged_file_without_timestamps(tmp_path):
    path = write_clip(tmp_path / "bare.h264", 20, options={"bf": "0"})
    data = path.read_bytes()
    units = [i for i in range(len(data) - 4) if data[i : i + 3] == b"\0\0\1"]
    broken = bytearray(data)
    broken[units[-8] + 4 : units[-7] - 1] = b"\xff" * (units[-7] - units[-8] - 5)
    path.write_bytes(broken)
    frames = list(open_video(path))
    assert [f.index for f in frames] == list(range(len(frames)))
    assert sum(f.error is not None for f in frames) >= 1
    assert frames[-1].image is not None


def test_a_file_without_its_end_gives_what_is_there(tmp_path):
    path = write_clip(tmp_path / "cut.mp4", 60, container={"movflags": "faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.7)])
    source = open_video(path)
    good = [f for f in source if f.image is not None]
    assert 10 < len(good) < 55
    assert [number_in(f.image) for f in good] == [f.index for f in good]
    (problem,) = source.problems
    assert "cut.mp4: can be read for " in problem
    assert "of 2.40 seconds" in problem


def test_recordings_strung_together_go_on(tmp_path):
    one, two = (write_clip(tmp_path / f"{i}.ts", 20, unit=Fraction(1, 90000)) for i in range(2))
    path = tmp_path / "both.ts"
    path.write_bytes(one.read_bytes() + two.read_bytes())  # the clock begins anew in the middle
    source = open_video(path)
    frames = list(source)
    assert [number_in(f.image) for f in frames] == [*range(20), *range(20)]
    assert [f.index for f in frames] == list(range(40))
    assert (np.diff([f.pts for f in frames]) > 0).all()
    assert source.count() == 40
    for index in (35, 3, 20, 19):
        assert number_in(source.seek(index).image) == index % 20


def test_a_changing_size_is_resized_to_the_first(tmp_path):
    source = open_video(write_two_sizes(tmp_path / "sizes.mkv", [(48, 96), (96, 192)]))
    frames = list(source)
    assert [f.image.shape for f in frames] == [(48, 96, 3)] * 12
    assert [number_in(f.image) for f in frames] == [*range(6), *range(6)]
    (problem,) = source.problems
    assert "from frame 6 on the size is 192 x 96 and not 96 x 48" in problem
    assert number_in(source.seek(8).image) == 2


def bad_file(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.mp4"
    if kind == "sound":
        path = folder / "sound.wav"
        with wave.open(str(path), "wb") as sound:
            sound.setparams((1, 2, 8000, 0, "NONE", ""))
            sound.writeframes(bytes(8000))
    elif kind == "text":
        path = folder / "text.txt"
        path.write_text("a video it is not\n" * 50)
    elif kind == "picture":
        path = folder / "picture.png"
        Image.new("RGB", (40, 30)).save(path)
    elif kind == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif kind == "empty":
        path.touch()
    elif kind in ("no index", "half an index"):
        data = write_clip(path, 5).read_bytes()
        index = data.index(b"moov")
        path.write_bytes(data[: index - 4] if kind == "no index" else data[: index + 200])
    elif kind == "all damaged":
        write_clip(path, 4)
        spoil(path, range(4))
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "playlist":
        path = folder / "list.ffconcat"
        clip = write_clip(folder / "other.mp4", 3)
        path.write_text(f"ffconcat version 1.0\nfile 'http://localhost:9/{clip.name}'\n")
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("sound", "has only sound, no video; name a file with pictures"),
        ("text", "is a text, not a video"),
        ("picture", "is a picture, not a video"),
        ("noise", "not a video, or cut off before its index"),
        ("empty", "the file is empty"),
        ("no index", "not a video, or cut off before its index"),
        ("half an index", "has no video; it may be cut off"),
        ("all damaged", "no frame can be decoded \\(all 4 are damaged: .*re-encode"),
        ("missing", "no such file"),
        ("pipe", "is a pipe, a device or a socket"),
        ("playlist", "not a video"),
    ],
)
def test_bad_files_are_named(tmp_path, kind, message):
    path = bad_file(tmp_path, kind)
    with pytest.raises(VideoError, match=f"{path.name}: .*{message}"):
        open_video(path)


def test_frames_that_do_not_exist(clips):
    for source in (
        open_video(clip(clips, "h264.mp4")),
        open_video(clip(clips, "bare.h264")),
        open_video(np.stack([numbered(i) for i in range(FRAMES)])),
    ):
        for index in (FRAMES, -1, 10**6):
            message = f"there is no frame {index}, the video has 30: numbered from 0 to 29"
            for read in (source.seek, lambda i, s=source: list(s.frames(i)), source.backwards):
                with pytest.raises(VideoError, match=message):
                    list(read(index))


def test_memory_does_not_grow_with_the_length(clips):
    path = clip(clips, "h264.mp4")
    list(open_video(path))
    tracemalloc.start()
    for _ in open_video(path):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A few pictures at a time (30 there are): one in the making, one handed out.
    assert peak < 5 * np.prod(SIZE) * 3 + 100_000


def write_pictures(folder: Path, names: list[str]) -> list[Path]:
    for i, name in enumerate(names):
        Image.fromarray(numbered(i)).save(folder / name)
    return [folder / name for name in names]


def test_a_folder_is_read_in_natural_order(tmp_path):
    names = ["f1.png", "f2.png", "F3.png", "f10.png", "f10b.png", "f0100.png", "g.png"]
    write_pictures(tmp_path, names)
    for other in (".hidden.png", "f1_overlay.png", "notes.txt"):
        (tmp_path / other).write_bytes(b"nothing")
    (tmp_path / "f2.png").write_bytes(b"broken")
    source = open_video(tmp_path, fps=10)
    frames = list(source)
    assert source.frame_names == tuple(names)
    assert [number_in(f.image) for f in frames if f.image is not None] == [0, 2, 3, 4, 5, 6]
    assert "f2.png" in frames[1].error
    assert frames[4].time == pytest.approx(0.4)
    assert number_in(source.seek(5).image) == 5
    assert sorted(["10", "9", "a1", "01", "1"], key=natural_key) == ["01", "1", "9", "10", "a1"]


def test_a_folder_of_different_sizes_is_refused(tmp_path):
    write_pictures(tmp_path, ["0.png", "1.png"])
    Image.new("RGB", (50, 40)).save(tmp_path / "2.png")
    message = "frame 2 .*2.png.* has 50 x 40 pixels, the first one 96 x 48"
    with pytest.raises(VideoError, match=message):
        list(open_video(tmp_path))


def test_bad_inputs_are_refused(tmp_path):
    with pytest.raises(VideoError, match="no pictures in the folder"):
        open_video(tmp_path)
    (tmp_path / "a.png").write_bytes(b"broken")
    with pytest.raises(VideoError, match=r"no readable frame .*a\.png"):
        open_video(tmp_path)
    with pytest.raises(VideoError, match=r"must be \(frames, height, width, 3\)"):
        open_video(numbered(0))
    with pytest.raises(VideoError, match="no readable frame"):
        open_video([])
    with pytest.raises(VideoError, match="frame 0: .*float"):
        open_video(iter([numbered(0) / 255]))
    with pytest.raises(VideoError, match="fps must be above 0"):
        open_video([numbered(0)], fps=0)


def test_arrays_and_lists(tmp_path):
    pictures = [numbered(i) for i in range(5)]
    paths = write_pictures(tmp_path, [f"{i}.png" for i in range(5)])
    mixed = [pictures[0], Image.fromarray(pictures[1]), *paths[2:]]
    for given in (np.stack(pictures), mixed):
        source = open_video(given, fps=Fraction(30000, 1001))
        assert (source.length, source.seekable) == (5, True)
        assert source.rate == Fraction(30000, 1001)
        assert [number_in(f.image) for f in source] == [0, 1, 2, 3, 4]
        assert number_in(source.seek(3).image) == 3
        assert [f.index for f in source.backwards()] == [4, 3, 2, 1, 0]


def test_an_endless_stream():
    taken = []

    def camera():
        for i in itertools.count():
            taken.append(i)
            yield None if i in (0, 4) else numbered(i)

    source = open_video(camera(), fps=50)
    assert (source.length, source.seekable, source.size) == (None, False, SIZE)
    assert taken == [0, 1]
    frames = list(itertools.islice(source, 6))
    assert [f.image is None for f in frames] == [True, False, False, False, True, False]
    assert "delivered no picture" in frames[4].error
    assert taken == list(range(6))
    assert source.seek(8).index == 8  # goes on from there
    with pytest.raises(VideoError, match=r"frame 3 .* is gone, the next one is 9"):
        source.seek(3)
    with pytest.raises(VideoError, match="no frame -1, frames are numbered from 0"):
        source.seek(-1)
    with pytest.raises(VideoError, match="not known"):
        list(source.backwards())
    assert [f.index for f in source.frames(9, 12)] == [9, 10, 11]
    assert next(iter(source)).index == 12


def test_a_stream_that_ends():
    source = open_video(numbered(i) for i in range(4))
    assert [f.index for f in source] == [0, 1, 2, 3]
    assert source.length == 4
    assert list(source) == []
    with pytest.raises(VideoError, match="ended without a readable frame"):
        open_video(iter([]))


def wait_until(condition) -> bool:
    for _ in range(200):
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_prefetch_works_ahead_but_not_far():
    made, closed = [], []

    def source():
        try:
            for i in range(1000):
                made.append(i)
                yield Frame(i, i, float(i), None)
        finally:
            closed.append(threading.current_thread() is not threading.main_thread())

    frames = prefetch(source(), depth=3)
    assert made == []
    assert next(frames).index == 0
    assert wait_until(lambda: len(made) == 5)  # one taken, three in the queue, one in the hand
    assert [next(frames).index for _ in range(10)] == list(range(1, 11))
    assert len(made) <= 15
    frames.close()
    assert wait_until(lambda: closed == [True])
    assert len(made) <= 16


def test_prefetch_gives_everything_and_then_the_error():
    def source():
        yield from range(7)
        raise VideoError("frame 7 is bad")

    items = prefetch(source(), depth=2)
    assert list(itertools.islice(items, 7)) == list(range(7))
    with pytest.raises(VideoError, match="frame 7"):
        next(items)
    assert list(prefetch(iter(range(50)), depth=1)) == list(range(50))
    assert list(prefetch(iter(()))) == []
    with pytest.raises(ValueError, match="depth must be at least 1"):
        prefetch(iter(()), depth=0)


def test_prefetch_of_a_file_leaves_no_thread_behind(clips):
    before = threading.active_count()
    for frame in prefetch(iter(open_video(clip(clips, "h264.mp4")))):
        if frame.index == 5:
            break
    del frame
    gc.collect()
    assert wait_until(lambda: threading.active_count() == before)
