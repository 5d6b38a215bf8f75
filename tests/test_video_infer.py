"""``infer.py`` on videos: what it writes, kinds of input, failures, going on. A tiny model."""

from __future__ import annotations

import dataclasses
import json
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest

import video_session
from infer_command import caller
from sam3_jax.inference import cli, rle
from sam3_jax.inference.arguments import PRESETS, build_parser
from sam3_jax.inference.prompts import PromptError
from sam3_jax.video import command, follow
from sam3_jax.video.config import NAMED, VideoConfig
from sam3_jax.video.cut import Span, cut
from sam3_jax.video.display import VideoFrame
from sam3_jax.video.frames import VideoError
from sam3_jax.video.overlay import draw_objects
from sam3_jax.video.predictor import VideoPredictor
from sam3_jax.video.reader import open_video
from sam3_jax.video.work import VideoSettings
from sam3_jax.video.writer import open_writer
from video_clips import spoil, write_clip
from video_session import FRAMES, SIZE, clip

CAT = ("--prompt", "cat")
make_predictor = VideoPredictor.from_engine  # tests replace it


@pytest.fixture(scope="module")
def predictor() -> VideoPredictor:
    return video_session.predictor()


@pytest.fixture
def run(predictor, monkeypatch, tmp_path):
    """Runs the command on the tiny model, writing to ``tmp_path / "out"``.

    By the command's rules, but where they are the default ones by those that suit random weights.
    """
    monkeypatch.setattr(
        VideoPredictor, "from_engine", lambda engine, video: suited(predictor, video)
    )
    return caller(predictor.engine, monkeypatch, tmp_path / "out")


def suited(predictor: VideoPredictor, video: VideoConfig) -> VideoPredictor:
    """A predictor by what ``video`` has otherwise than the default, and the tiny rules."""
    default, own = VideoConfig(), predictor.video

    def changed(part: str) -> Any:
        before, now, tiny = (getattr(config, part) for config in (default, video, own))
        kept = ("bucket_size",)  # a machine's
        names = [f.name for f in dataclasses.fields(before) if f.name not in kept]
        values = {name: getattr(now, name) for name in names}
        new = {name: v for name, v in values.items() if v != getattr(before, name)}
        return dataclasses.replace(tiny, **new)

    rules = dataclasses.replace(
        own, tracker=changed("tracker"), concepts=changed("concepts"), snapshot_bytes=0
    )
    made = make_predictor(predictor.engine, video=rules)
    if rules.tracker == own.tracker:  # the same programs: compiling is what takes time
        made._programs = predictor._programs
    if rules.concepts == own.concepts:
        made._concepts = predictor._concepts
    return made


@pytest.fixture
def movie(tmp_path) -> Path:
    path = tmp_path / "clip.mp4"
    with open_writer(path, SIZE, rate=Fraction(10)) as writer:
        for image in clip():
            writer.write(image)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "frames"
    path.mkdir()
    for number, image in enumerate(clip()):
        PIL.Image.fromarray(image).save(path / f"f{number}.png")
    return path


def tracks(tmp_path: Path, name: str = "clip") -> dict:
    return json.loads((tmp_path / "out" / f"{name}_tracks.json").read_text())


def records(tmp_path: Path) -> list[dict]:
    (path,) = (tmp_path / "out" / "videos").iterdir()
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def test_a_video_becomes_tracks_an_overlay_and_a_sheet(run, movie, tmp_path, predictor, capsys):
    assert run("--input", movie, *CAT, "blue square", "--verbose") == 0
    data = tracks(tmp_path)
    assert [c["name"] for c in data["categories"]] == ["cat", "blue square"]
    assert data["videos"][0]["length"] == FRAMES
    session = predictor.start(movie)
    session.add_text("cat")
    session.add_text("blue square")
    found = list(session.propagate())
    assert {a["id"] for a in data["annotations"]} == {i for f in found for i in f.ids.tolist()}
    assert data["annotations"]
    for track in data["annotations"]:
        for frame, mask in zip(found, track["segmentations"], strict=True):
            at = np.flatnonzero(frame.ids == track["id"])
            assert (mask is not None) == bool(len(at))
            if mask is not None:
                np.testing.assert_array_equal(rle.decode_mask(mask), frame.masks[at[0]])
                assert track["phrase"] == frame.phrases[at[0]]
    shown = list(open_video(tmp_path / "out" / "clip_overlay.mp4"))
    assert [f.time for f in shown] == pytest.approx(np.arange(FRAMES) / 10)
    busy = max(found, key=lambda frame: frame.masks.sum())
    plain = open_video(movie).seek(busy.index).image
    drawn = draw_objects(plain, busy.objects)
    image = shown[busy.index].image.astype(int)
    assert np.abs(image - drawn).mean() < 0.3 * np.abs(image - plain).mean()  # coding is lossy
    assert PIL.Image.open(tmp_path / "out" / "clip_sheet.jpg").width > 4 * SIZE[1]
    lines = (tmp_path / "out" / "frames" / "clip.jsonl").read_text().splitlines()
    assert len(lines) == FRAMES + 1
    captured = capsys.readouterr()
    assert f"1 of 1 videos, {FRAMES} frames, {len(data['annotations'])} objects" in captured.out
    sizes = predictor.state_bytes(1)
    assert f"memory of objects: {sizes.per_object / 1e6:.3g} MB each" in captured.err
    assert "10 frames" in captured.err
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_a_folder_of_frames_in_parts(run, folder, tmp_path, predictor):
    common = ("--video", "--input", folder, *CAT, "--fps", "10", "--no-overlay")
    assert run(*common, "--frames", "1::2") == 0
    (video,) = tracks(tmp_path, "frames")["videos"]
    assert video["file_names"] == ["f1.png", "f3.png", "f5.png", "f7.png", "f9.png"]
    assert video["times"] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert video["fps"] == 5
    session = predictor.start(clip()[1::2])
    session.add_text("cat")
    ids = {i for frame in session.propagate() for i in frame.ids.tolist()}
    assert {a["id"] for a in tracks(tmp_path, "frames")["annotations"]} == ids
    assert not list((tmp_path / "out").glob("*.mp4"))
    assert not list((tmp_path / "out").glob("*.jpg"))


def test_one_object_from_a_frame_on(run, movie, tmp_path, predictor):
    mask = np.zeros(SIZE, bool)
    mask[10:40, 20:50] = True
    PIL.Image.fromarray(mask).save(tmp_path / "mask.png")
    given = ("--point", "40,20", "--point", "5,5,-", "--object-box", "10,8,40,40", "--at", "2")
    assert run("--input", movie, *given) == 0
    data = tracks(tmp_path)
    assert [c["name"] for c in data["categories"]] == ["object"]
    (track,) = data["annotations"]
    assert track["segmentations"][:2] == [None, None]
    session = predictor.start(movie)
    session.add_points(2, [[40, 20], [5, 5]], [1, 0], box=[10, 8, 40, 40])
    for frame in session.propagate():
        stored = track["segmentations"][frame.index]
        found = frame.masks[0] if len(frame.ids) else np.zeros(SIZE, bool)
        np.testing.assert_array_equal(found, stored is not None and rle.decode_mask(stored))
    shown = list(open_video(tmp_path / "out" / "clip_overlay.mp4"))
    assert [f.time for f in shown] == pytest.approx(np.arange(FRAMES) / 10)
    plain = [frame.image.astype(int) for frame in open_video(movie)]
    changes = [np.abs(a.image - b).mean() for a, b in zip(shown, plain, strict=True)]
    assert max(changes[:2]) < 0.5 * max(changes[2:]), "nothing is drawn before, but coded it is"
    assert data["videos"][0]["times"][:3] == [None, None, 0.2]
    lines = (tmp_path / "out" / "frames" / "clip.jsonl").read_text().splitlines()[1:]
    assert [json.loads(line)["frame"] for line in lines] == list(range(2, FRAMES))
    assert run("--input", movie, "--mask-prompt", tmp_path / "mask.png", "--overwrite") == 0
    first = rle.decode_mask(tracks(tmp_path)["annotations"][0]["segmentations"][0])
    assert (first ^ mask).mean() < 0.05  # its edge is off by a low-resolution pixel


def test_scores_of_every_frame(run, movie, tmp_path, predictor):
    """What the tracker thinks of an object frame by frame, beside what it came of."""
    assert run("--input", movie, *CAT, "--no-overlay") == 0
    session = predictor.start(movie)
    session.add_text("cat")
    found = list(session.propagate())
    annotations = {a["id"]: a for a in tracks(tmp_path)["annotations"]}
    lines = (tmp_path / "out" / "frames" / "clip.jsonl").read_text().splitlines()[1:]
    for frame, line in zip(found, lines, strict=True):
        objects = {item["id"]: item for item in json.loads(line)["objects"]}
        assert sorted(objects) == frame.ids.tolist()
        for i, one, score in zip(frame.ids, frame.scores, frame.tracker_scores, strict=True):
            track = annotations[int(i)]
            assert objects[int(i)]["score"] == track["scores"][frame.index]
            assert objects[int(i)]["tracker_score"] == track["tracker_scores"][frame.index]
            assert track["scores"][frame.index] == pytest.approx(one, abs=1e-6)
            assert track["tracker_scores"][frame.index] == pytest.approx(score, abs=1e-6)
    for i, track in annotations.items():
        there = [i in frame.ids for frame in found]
        assert [score is not None for score in track["tracker_scores"]] == there
        assert len(set(track["scores"]) - {None}) == 1
    assert max(len(set(a["tracker_scores"])) for a in annotations.values()) > 2


def test_settings_reach_the_session(run, movie, tmp_path):
    """Each by what it changes in the results."""

    def found(*arguments: str) -> list[dict]:
        assert run("--input", movie, *CAT, "--no-overlay", "--overwrite", *arguments) == 0
        return tracks(tmp_path)["annotations"]

    def begins(annotations: list[dict]) -> set[int]:
        areas = [a["areas"] for a in annotations]
        return {next(i for i, area in enumerate(own) if area is not None) for own in areas}

    plain = found()
    assert plain
    assert found("--threshold", "0.9") == []
    low = found("--threshold", "0.05")
    assert low
    assert min(a["score"] for a in low) > 0.05
    early = found("--delay", "0")
    assert {a["id"] for a in early} > {a["id"] for a in plain}, "what hotstart removes"
    # SAM 3.1 shows what was found three times running, of which the first frame counts twice.
    confirmed = found("--delay", "0", "--preset", "sam3.1", "--threshold", "0.05")
    assert 0 in begins(early)
    assert min(begins(confirmed)) == 1


def test_boxes_are_exemplars_on_their_frame(run, movie, tmp_path):
    assert run("--input", movie, "--box", "4,4,40,40", "--at", "3", "--no-overlay") == 0
    data = tracks(tmp_path)
    assert [c["name"] for c in data["categories"]] == ["visual"]
    assert all(not any(a["segmentations"][:3]) for a in data["annotations"])
    assert run("--input", movie, "--box", "400,4,500,40", "--overwrite") == 1
    assert "lies outside" in records(tmp_path)[-1]["error"]
    assert run("--input", movie, *CAT, "--box", "4,4,40,40", "--at", "99", "--overwrite") == 1
    assert "there is no frame 99" in records(tmp_path)[-1]["error"]


def test_a_threshold_of_one_video_is_refused(run, movie, tmp_path):
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text(json.dumps({"image": "clip.mp4", "phrases": ["cat"], "threshold": 0.1}))
    assert run("--jobs", jobs) == 1
    error = "a video has no threshold of its own: leave out the job's, and give --threshold"
    assert error in records(tmp_path)[-1]["error"]


def test_bad_videos_do_not_end_the_run(run, movie, tmp_path, capsys):
    """Same names in two folders, too."""
    bad = tmp_path / "bad"
    bad.mkdir()
    with av.open(str(bad / "sound.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.float32), "fltp", "mono")
        frame.sample_rate = 48000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    (bad / "cut.mp4").write_bytes(movie.read_bytes()[:500])
    (bad / "empty.webm").write_bytes(b"")
    (bad / "clip.mp4").write_bytes(movie.read_bytes())
    write_clip(bad / "damaged.mp4", 10, size=SIZE, gop=5, options={"bf": "0"})
    (lost,) = spoil(bad / "damaged.mp4", [7])
    assert run("--input", bad, movie, tmp_path / "none.mkv", *CAT) == 1
    by_name = {Path(r["file_name"]).name: r for r in records(tmp_path)}
    status = {name: record["status"] for name, record in by_name.items()}
    wrong = ["sound.mp4", "cut.mp4", "empty.webm", "none.mkv"]
    assert status == {"clip.mp4": "ok", "damaged.mp4": "ok"} | dict.fromkeys(wrong, "error")
    assert "only sound" in by_name["sound.mp4"]["error"]
    assert "no such file" in by_name["none.mkv"]["error"]
    assert "the file is empty" in by_name["empty.webm"]["error"]
    assert by_name["damaged.mp4"]["bad_frames"] >= 1
    assert str(lost) in tracks(tmp_path, "damaged")["videos"][0]["errors"]
    assert tracks(tmp_path, "bad_clip")["annotations"]
    first, second = (tracks(tmp_path, name)["annotations"] for name in ("bad_clip", "clip"))
    assert first == second
    captured = capsys.readouterr()
    for name in wrong:
        (line,) = [x for x in captured.err.splitlines() if x.startswith("failed:") and name in x]
        assert "Traceback" not in line
    assert "warning: " in captured.err
    assert "missing or damaged" in captured.err
    assert "3 of 7 videos" in captured.out
    assert "4 failed" in captured.err
    assert not list((tmp_path / "out").glob("cut*"))


def test_a_stopped_run_goes_on_with_the_next_video(run, movie, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other.mp4"
    other.write_bytes(movie.read_bytes())
    arguments = ("--input", movie, other, *CAT)
    finish = follow._finish

    def stop_in_the_second(found, *rest):
        if found.index == 5 and (tmp_path / "out" / "clip_tracks.json").exists():
            raise KeyboardInterrupt
        return finish(found, *rest)

    monkeypatch.setattr(follow, "_finish", stop_in_the_second)
    assert run(*arguments) == 130
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir() if p.is_file()} == {
        "clip_overlay.mp4", "clip_sheet.jpg", "clip_tracks.json",
    }  # fmt: skip
    # As a killed process leaves it: half a file beside it, and a torn line.
    left = out / ".other_overlay.mp4.123.tmp"
    left.write_bytes(b"half")
    with (out / "frames" / "other.jsonl").open("a") as file:
        file.write('{"frame": 77, "obj')
    changed = (out / "clip_tracks.json").stat().st_mtime_ns
    monkeypatch.setattr(follow, "_finish", finish)
    capsys.readouterr()
    assert run(*arguments) == 0
    assert "2 of 2 videos (1 done before), 10 frames" in capsys.readouterr().out
    assert (out / "clip_tracks.json").stat().st_mtime_ns == changed
    assert tracks(tmp_path, "other")["annotations"] == tracks(tmp_path)["annotations"]
    assert not left.exists()
    assert run("--merge") == 2
    assert "videos only, which need no merging" in capsys.readouterr().err
    assert run("--input", movie, other, "--prompt", "dog") == 2
    assert 'phrases was ["cat"], is ["dog"]' in capsys.readouterr().err


def test_shards_do_each_their_videos(run, movie, tmp_path, capsys):
    others = [tmp_path / "other.mp4", tmp_path / "third.mp4"]
    for path in others:
        path.write_bytes(movie.read_bytes())
    common = ("--input", movie, *others, *CAT, "--no-overlay")
    done = []
    for number, count in enumerate((2, 1)):
        assert run(*common, "--shard", f"{number}/2") == 0
        assert f"{count} of {count} videos, " in capsys.readouterr().out
        done.append({path.name for path in (tmp_path / "out").glob("*_tracks.json")})
    assert done[0] == {"clip_tracks.json", "third_tracks.json"}
    assert done[1] == done[0] | {"other_tracks.json"}
    assert tracks(tmp_path, "other")["annotations"] == tracks(tmp_path)["annotations"]


def test_pictures_and_videos_each_their_own_way(tmp_path, movie, folder):
    PIL.Image.fromarray(clip()[0]).save(tmp_path / "photo.png")
    for name in ("old_overlay.mp4", "old_sheet.jpg", "old_overlay.png"):  # ours
        (tmp_path / name).write_bytes(b"")

    def work(*arguments: str | Path) -> list[list[str]]:
        args = build_parser().parse_args([*map(str, arguments), *CAT])
        return [[j.image.name for j in part] for part in cli.split_work(args, cli.read_work(args))]

    assert work("--input", tmp_path) == [["photo.png"], ["clip.mp4"]]
    assert work("--input", tmp_path / "*.mp4", movie) == [[], ["clip.mp4"]]
    assert work("--video", "--input", folder, movie) == [[], ["frames", "clip.mp4"]]
    (tmp_path / "photo.png").unlink()
    movie.unlink()
    assert work("--video", "--input", tmp_path) == [[], ["frames"]]
    jobs = tmp_path / "jobs.jsonl"
    lines = [
        {"image": "frames", "points": [[3, 4]], "frame": 2},
        {"image": "x.jpg", "phrases": ["a"]},
        {"image": "y.webm", "phrases": ["a"]},
        {"image": "x.jpg", "phrases": ["a"], "frame": 3},
    ]
    jobs.write_text("\n".join(map(json.dumps, lines)))
    args = build_parser().parse_args(["--jobs", str(jobs)])
    pictures, videos = cli.split_work(args, cli.read_work(args))
    assert [(j.image.name, j.frame) for j in videos] == [("frames", 2), ("y.webm", None)]
    assert pictures[0].image.name == "x.jpg"
    assert pictures[1].error == "frame is of videos, x.jpg is a picture"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "x.mp4", *CAT, "--frames", "3"], "'3' is not START:STOP:STEP"),
        (["--input", "x.mp4", *CAT, "--frames", "3:2"], "'3:2' is no frame"),
        (["--input", "x.mp4", *CAT, "--frames", "::0"], "STEP from 1 on"),
        (["--input", "x.mp4", *CAT, "--fps", "0"], "is no number of frames a second"),
        (["--input", "x.mp4", *CAT, "--preset", "sam4"], "invalid choice"),
        (["--input", "x.mp4", *CAT, "--tile", "500"], "--tile is for pictures, and there are none"),
        (["--input", "x.mp4", *CAT, "--boxes", "masks"], "--boxes is for pictures, and there are"),
        (["--input", "x.mp4", *CAT, "--batch-size", "2"], "--batch-size is for pictures, and "),
        (["--input", "x.mp4", *CAT, "--nms-threshold", "0.3"], "--nms-threshold is for pictures"),
        (["--input", "x.jpg", *CAT, "--delay", "0"], "--delay is for videos, and there are none"),
        (["--input", "x.jpg", *CAT, "--at", "3"], "frame is of videos, x.jpg is a picture"),
        (["--input", "x.mp4", "--everything"], "--everything is for pictures"),
        (["--input", "x.mp4"], "say what to look for"),
        (["--video", "--input", ".", *CAT], "no pictures or videos in the folder ."),
    ],
)
def test_mistakes_are_explained(run, arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    try:
        status = run(*arguments)
    except SystemExit as stop:  # argparse's own
        status = stop.code
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_parts_of_a_video(movie):
    whole = open_video(movie)
    assert cut(whole, Span()) is whole
    part = cut(whole, Span(2, 9, 3))
    frames = list(part)
    assert [f.index for f in frames] == [0, 1, 2]
    assert [f.time for f in frames] == pytest.approx([0.2, 0.5, 0.8])
    for frame, number in zip(frames, (2, 5, 8), strict=True):
        np.testing.assert_array_equal(frame.image, whole.seek(number).image)
    assert (part.count(), part.length, part.size) == (3, 3, SIZE)
    assert part.rate == whole.rate / 3
    np.testing.assert_array_equal(part.seek(1).image, frames[1].image)
    assert [f.index for f in part.backwards()] == [2, 1, 0]
    with pytest.raises(VideoError, match="there is no frame 10, the video has 10"):
        cut(whole, Span(10))
    with pytest.raises(VideoError, match="there is no frame 3"):
        part.seek(3)
    assert Span(2, 9, 3).place(5, "clip") == 1
    for frame in (1, 3, 9, 11):
        with pytest.raises(PromptError, match=rf"frame {frame} is not among .* \(2:9:3\)"):
            Span(2, 9, 3).place(frame, "clip")


def test_tracking_drawing_and_writing_overlap(predictor, monkeypatch):
    """All three are busy at the same time: each waits for the others, with different frames."""
    together = threading.Barrier(3, timeout=60)
    session = predictor.start(clip())
    none = np.zeros(0, np.int32)
    empty = np.zeros((0, *SIZE), bool), np.zeros((0, 4), np.float32)

    def track():
        for i in range(FRAMES):
            if i == 6:
                together.wait()
            yield VideoFrame(i, none, *empty, none.astype(float), (), none.astype(float))

    finish = follow._finish

    def draw(found, *rest):
        if found.index == 3:
            together.wait()
        return finish(found, *rest)

    monkeypatch.setattr(session, "propagate", track)
    monkeypatch.setattr(follow, "_finish", draw)
    for done in follow._finished(session, VideoSettings(workers=2)):
        if done.frame.index == 0:
            together.wait()
        np.testing.assert_array_equal(done.drawn, clip()[done.frame.index])
    assert done.frame.index == FRAMES - 1


def test_settings_of_a_command():
    assert set(PRESETS) == set(NAMED)
    assert command.config_of("default").concepts == VideoConfig().concepts
    assert command.config_of("sam3", 0.3).concepts.detection_score == 0.3
    assert command.config_of("sam3", 0.3).concepts.new_score == 0.3
    assert command.config_of("sam3.1").concepts.confirmation
    assert command.config_of("default", devices=6).tracker.bucket_size == 18
    assert command.config_of("default", devices=8).tracker.bucket_size == 16
