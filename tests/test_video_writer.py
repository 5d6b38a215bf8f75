"""What is written of a video: overlays, results frame by frame and by object, a contact sheet."""

from __future__ import annotations

import json
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from sam3_jax.inference.files import UsageError
from sam3_jax.video.contact_sheet import CAPTION, GAP, ContactSheet
from sam3_jax.video.objects import Objects
from sam3_jax.video.overlay import color_of, draw_objects
from sam3_jax.video.reader import Frame, VideoError, open_video
from sam3_jax.video.results import frame_record, open_results, read_results, results_path
from sam3_jax.video.tracks import is_merged, merge_tracks
from sam3_jax.video.writer import ENCODERS, find_encoder, open_writer
from video_clips import SIZE, has_encoder, number_in, numbered

RUN = {"prompts": ["cat", "dog"], "threshold": 0.5}
ENCODERS_HERE = [name for name in ENCODERS if has_encoder(name)]


def write_numbered(path: Path, times: list[int | None], **how) -> Path:
    with open_writer(path, SIZE, **how) as writer:
        for i, pts in enumerate(times):
            writer.write(numbered(i), pts)
    return path


@pytest.mark.parametrize("encoder", ENCODERS_HERE)
def test_a_written_video_is_read_back(tmp_path, encoder):
    path = write_numbered(tmp_path / "out.mp4", [None] * 20, encoder=encoder, rate=Fraction(30))
    source = open_video(path)
    frames = list(source)
    assert [number_in(f.image) for f in frames] == list(range(20))
    np.testing.assert_allclose([f.time for f in frames], np.arange(20) / 30, atol=1e-4)
    assert source.rate == 30
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
    assert path.read_bytes().index(b"moov") < path.read_bytes().index(b"mdat")  # for browsers
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("encoder", ENCODERS_HERE)
@pytest.mark.parametrize("unit", [Fraction(1, 12800), Fraction(1, 1_000_000)])
def test_uneven_times_are_kept(tmp_path, encoder, unit):
    seconds = np.cumsum([0, 0.04, 0.04, 0.2, 0.01, 0.5, 0.04, 3.0, 0.04])
    pts = [round(s / unit) for s in seconds]
    path = write_numbered(tmp_path / "vfr.mp4", pts, time_base=unit, encoder=encoder)
    frames = list(open_video(path))
    assert [number_in(f.image) for f in frames] == list(range(9))
    # Half a unit of the coarsest clock: MPEG-4's, 1 / 60000 s, or 1 / 12800 s.
    np.testing.assert_allclose([f.time for f in frames], seconds, atol=0.5 / 12800)


def test_times_that_do_not_grow_are_moved(tmp_path):
    path = write_numbered(tmp_path / "odd.mkv", [0, 40, 40, 20, 120], time_base=Fraction(1, 1000))
    assert [round(f.time * 1000) for f in open_video(path)] == [0, 40, 41, 42, 120]


def test_colours_survive(tmp_path):
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (38, 139, 255), (255, 255, 255), (0, 0, 0)]
    with open_writer(tmp_path / "c.mov", (64, 64)) as writer:
        for color in colors:
            writer.write(np.full((64, 64, 3), color, np.uint8))
    for frame, color in zip(open_video(tmp_path / "c.mov"), colors, strict=True):
        # Lossy coding and 8-bit YUV; with the wrong matrix green is off by 50.
        np.testing.assert_allclose(frame.image.mean((0, 1)), color, atol=5)


@pytest.mark.parametrize("size", [(47, 96), (48, 95), (47, 95), (1, 1)])
def test_odd_sizes_are_padded(tmp_path, size):
    image = numbered(5)[: size[0], : size[1]]
    with open_writer(tmp_path / "odd.mp4", size) as writer:
        writer.write(image)
    read = open_video(tmp_path / "odd.mp4").seek(0).image
    assert read.shape == (size[0] + size[0] % 2, size[1] + size[1] % 2, 3)
    assert np.abs(read[: size[0], : size[1]].astype(int) - image).mean() < 12  # chroma is halved


def test_a_failure_leaves_the_older_file(tmp_path):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"older")

    def fail():
        with open_writer(path, SIZE) as writer:
            writer.write(numbered(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    with (
        pytest.raises(VideoError, match=r"out.mp4: no frame was written"),
        open_writer(path, SIZE),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"out.mp4: a frame must have shape \(48, 96, 3\)"),
        open_writer(path, SIZE) as writer,
    ):
        writer.write(numbered(0)[:-1])
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(VideoError, match=r"out.gif: name a video file to write .mp4"):
        write_numbered(tmp_path / "out.gif", [None])
    with pytest.raises(VideoError, match="none of the encoders no_such; install PyAV"):
        write_numbered(tmp_path / "out.mp4", [None], encoder="no_such")
    with pytest.raises(OSError, match=r"nowhere/out.mp4") as caught:
        write_numbered(tmp_path / "nowhere" / "out.mp4", [None])
    assert isinstance(caught.value, FileNotFoundError)
    assert find_encoder(("no_such", "mpeg4")) == "mpeg4"


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """Boxes (x0, y0, x1, y1) around masks, by pycocotools."""
    rles = coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0), np.uint8))
    boxes = coco_mask.toBbox(rles).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1).astype(np.float32)


def made_up(frame: int, ids: list[int]) -> Objects:
    """Objects at places that depend on frame and id; odd ids are cats, even ones dogs."""
    masks = np.zeros((len(ids), *SIZE), bool)
    for mask, i in zip(masks, ids, strict=True):
        y, x = (5 * i + frame) % 30, (11 * i + 2 * frame) % 70
        mask[y : y + 9, x : x + 12 + i] = True
        mask[y + 3, x + 3] = False
    scores = np.asarray([0.5 + 0.03 * i + 0.001 * frame for i in ids], np.float32)
    phrases = tuple("cat" if i % 2 else "dog" for i in ids)
    tracker = np.asarray([0.9 - 0.02 * i - 0.01 * frame for i in ids], np.float32)
    return Objects(np.asarray(ids, np.int64), masks, boxes_of(masks), scores, phrases, tracker)


def test_an_object_keeps_its_colour(tmp_path):
    image = np.full((*SIZE, 3), 128, np.uint8)
    both, alone = made_up(0, [3, 4]), made_up(0, [4])
    tint = draw_objects(image, both, show_ids=False, show_phrases=False)
    assert (image == 128).all()
    y, x = np.argwhere(both.masks[1] & ~both.masks[0]).mean(0).astype(int)
    other = draw_objects(image, alone, show_ids=False, show_phrases=False)
    np.testing.assert_array_equal(tint[y + 2, x + 3], other[y + 2, x + 3])
    towards = np.sign(np.asarray(color_of(4), int) - 128)
    np.testing.assert_array_equal(np.sign(other[y + 2, x + 3].astype(int) - 128), towards)
    colors = [color_of(i) for i in range(200)]
    assert len(set(colors)) == 200
    assert color_of(10**9) == color_of(10**9)


def test_tags_name_the_object(monkeypatch):
    from sam3_jax.inference import visualize

    seen = []
    monkeypatch.setattr(visualize, "_draw_tags", lambda *args: seen.append(args))
    image, objects = numbered(0), made_up(0, [2, 7])
    draw_objects(image, objects)
    draw_objects(image, objects, show_scores=True)
    draw_objects(image, objects, show_ids=False)
    assert [args[3] for args in seen] == [
        ["#2 dog", "#7 cat"],
        ["#2 dog 0.56", "#7 cat 0.71"],
        ["dog", "cat"],
    ]
    # The older object chooses its place first, whatever the scores.
    assert np.argsort(-seen[0][2]).tolist() == [0, 1]


def test_tags_are_drawn_and_empty_objects_are_not():
    image, objects = np.zeros((200, 300, 3), np.uint8), made_up(0, [1])
    masks = np.zeros((2, 200, 300), bool)
    masks[0, 100:150, 100:200] = True
    ones = np.ones(2)
    objects = Objects(np.asarray([1, 2]), masks, boxes_of(masks), ones, ("cat", "dog"), ones)
    plain = draw_objects(image, objects, show_ids=False, show_phrases=False)
    tagged = draw_objects(image, objects)
    assert (plain != tagged).any(2).sum() > 100
    nothing = Objects(*(value[:0] for value in objects))
    np.testing.assert_array_equal(draw_objects(image, nothing), image)


def test_objects_that_do_not_fit_are_refused():
    image, objects = numbered(0), made_up(0, [1, 2])
    with pytest.raises(ValueError, match="one value of each"):
        draw_objects(image, objects._replace(phrases=("cat",)))
    with pytest.raises(ValueError, match=r"do not fit 2 objects on a frame of 40 x 96 pixels"):
        draw_objects(image[:40], objects)
    with pytest.raises(ValueError, match=r"unique in a frame, got \[1, 1\]"):
        draw_objects(image, objects._replace(ids=np.asarray([1, 1])))


# Which objects are in which frame; 3 goes and comes back, 5 appears late, frame 4 is missing.
PRESENT = {0: [2, 3], 1: [3], 2: [], 3: [2, 5, 3], 4: [3], 5: [5, 2]}


def frame_of(index: int) -> Frame:
    missing = index == 4
    image = None if missing else numbered(index)
    return Frame(index, index * 10, index / 25, image, "damaged" if missing else None)


def record_all(path: Path, video, order: list[int], run=RUN) -> None:
    with open_results(path, video, run) as writer:
        for i in order:
            writer.write(frame_record(frame_of(i), made_up(i, PRESENT[i]), SIZE))


@pytest.fixture
def video():
    return open_video(np.stack([numbered(i) for i in range(6)]))


def test_tracks_have_a_mask_in_every_frame(tmp_path, video):
    path = results_path(tmp_path, "clip")
    record_all(path, video, [0, 1, 2, 3, 4, 5])
    names = [f"{i}.jpg" for i in range(6)]
    merged = merge_tracks(path, tmp_path / "clip.json", phrases=["bird"], frame_names=names)
    content = json.loads(merged.read_text())
    assert content["schema_version"] == 1
    assert content["info"]["prompts"] == ["cat", "dog"]
    (about,) = content["videos"]
    assert (about["width"], about["height"], about["length"], about["fps"]) == (96, 48, 6, 25.0)
    assert about["file_names"] == names
    assert about["times"] == [0.0, 0.04, 0.08, 0.12, 0.16, 0.2]
    assert about["errors"] == {"4": "damaged"}
    categories = {c["name"]: c["id"] for c in content["categories"]}
    assert categories == {"bird": 1, "dog": 2, "cat": 3}
    assert [a["id"] for a in content["annotations"]] == [2, 3, 5]
    for item in content["annotations"]:
        i = item["id"]
        assert item["phrase"] == ("cat" if i % 2 else "dog")
        assert item["category_id"] == categories[item["phrase"]]
        names = ("segmentations", "bboxes", "areas", "scores", "tracker_scores")
        lists = [item[name] for name in names]
        assert {len(values) for values in lists} == {6}
        for frame, (rle, box, area, score, tracker) in enumerate(zip(*lists, strict=True)):
            if i not in PRESENT[frame]:
                assert (rle, box, area, score, tracker) == (None,) * 5
                continue
            expected = made_up(frame, [i])
            np.testing.assert_array_equal(coco_mask.decode(rle), expected.masks[0])
            assert box == coco_mask.toBbox(rle).tolist()
            assert area == expected.masks[0].sum()
            assert score == pytest.approx(expected.scores[0], abs=1e-6)
            assert tracker == pytest.approx(expected.tracker_scores[0], abs=1e-6)
        present = [score for score in item["scores"] if score is not None]
        assert item["score"] == pytest.approx(np.mean(present), abs=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.json", "frames"]


def test_a_run_goes_on_after_a_kill(tmp_path, video):
    path = results_path(tmp_path, "clip")
    record_all(path, video, [0, 1, 2, 3])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])  # in the middle of frame 3
    assert read_results(path).done == 3
    record_all(path, video, [3, 4])
    assert path.read_bytes()[: len(whole)] == whole
    recorded = read_results(path)
    assert (recorded.done, recorded.length) == (5, 5)
    record_all(path, video, [5])
    once = merge_tracks(path, tmp_path / "a.json").read_text()
    other = results_path(tmp_path / "b", "clip")
    record_all(other, video, [0, 1, 2, 3, 4, 5])
    assert once == merge_tracks(other, tmp_path / "b.json").read_text()


def test_a_run_goes_on_from_older_results(tmp_path, video):
    """Those without the tracker's scores."""
    path = results_path(tmp_path, "clip")
    record_all(path, video, [0, 1])
    head, *lines = map(json.loads, path.read_text().splitlines())
    for item in (item for line in lines for item in line["objects"]):
        del item["tracker_score"]
    path.write_text("".join(json.dumps(line) + "\n" for line in (head, *lines)))
    record_all(path, video, [2, 3])
    content = json.loads(merge_tracks(path, tmp_path / "x.json").read_text())
    (item,) = [a for a in content["annotations"] if a["id"] == 3]
    assert item["tracker_scores"][:3] == [None] * 3
    assert item["tracker_scores"][3] == pytest.approx(made_up(3, [3]).tracker_scores[0], abs=1e-6)
    assert [score is None for score in item["scores"]] == [False, False, True, False]


def test_the_last_record_of_a_frame_counts(tmp_path, video):
    path = results_path(tmp_path, "clip")
    record_all(path, video, [0, 1, 2])
    with open_results(path, video, RUN) as writer:  # a correction: the dog of frame 0 is a cat
        writer.write(frame_record(frame_of(0), made_up(0, [7]), SIZE))
        writer.write(frame_record(frame_of(4), made_up(4, [7]), SIZE))
    recorded = read_results(path)
    assert (recorded.done, recorded.length) == (3, 5)
    assert [r["frame"] for r in recorded.frames()] == [0, 1, 2, 4]
    content = json.loads(merge_tracks(path, tmp_path / "x.json").read_text())
    present = {a["id"]: [s is not None for s in a["areas"]] for a in content["annotations"]}
    assert present == {
        3: [False, True, False, False, False],
        7: [True, False, False, False, True],
    }
    assert content["videos"][0]["times"] == [0.0, 0.04, 0.08, None, 0.16]


def test_results_of_other_settings_are_refused(tmp_path, video):
    path = results_path(tmp_path, "clip")
    record_all(path, video, [0])
    with pytest.raises(UsageError, match=r"other settings \(threshold was 0.5, is 0.6\)"):
        open_results(path, video, {**RUN, "threshold": 0.6})
    small = open_video(np.zeros((1, 20, 30, 3), np.uint8))
    with pytest.raises(UsageError, match=r"video.width was 96, is 30"):
        open_results(path, small, RUN)
    with pytest.raises(UsageError, match="no results in .*other.jsonl"):
        read_results(results_path(tmp_path, "other"))


def test_finished_videos_are_known_by_their_first_line(tmp_path, video):
    path, merged = results_path(tmp_path, "clip"), tmp_path / "clip.json"
    record_all(path, video, [0])
    assert not is_merged(merged, RUN)
    merge_tracks(path, merged)
    assert is_merged(merged, RUN)
    assert not is_merged(merged, {**RUN, "threshold": 0.6})
    merged.write_text("[1, 2]")
    assert not is_merged(merged, RUN)


def test_a_video_without_objects(tmp_path, video):
    path = results_path(tmp_path, "clip")
    record_all(path, video, [2])
    content = json.loads(merge_tracks(path, tmp_path / "x.json", phrases=["cat"]).read_text())
    assert content["annotations"] == []
    assert content["categories"] == [{"id": 1, "name": "cat"}]
    assert content["videos"][0]["length"] == 3


def test_merging_needs_no_memory_for_the_masks(tmp_path, video):
    def peak(frames: int) -> int:
        path = results_path(tmp_path, f"{frames}")
        record = frame_record(frame_of(0), made_up(0, [1, 2, 3]), SIZE)
        for item in record["objects"]:
            item["segmentation"]["counts"] *= 40
        with open_results(path, video, RUN) as writer:
            for i in range(frames):
                writer.write({**record, "frame": i})
        tracemalloc.start()
        merged = merge_tracks(path, tmp_path / f"{frames}.json")
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert merged.stat().st_size > frames * 3 * 700
        return used

    few, many = peak(50), peak(450)
    # 400 frames more are 1 MB of results; of their times and first lines there are 50 kB.
    assert many - few < 100_000


def test_a_contact_sheet_of_any_length(tmp_path):
    for length, count in [(1, 12), (5, 12), (12, 12), (60, 12), (63, 5), (64, 1)]:
        sheet = ContactSheet(count=count, columns=3, side=96)
        for i in range(length):
            if sheet.wants(i):
                sheet.add(i, i / 25, numbered(i % 64))
            assert len(sheet._kept) < max(2 * count, 2)
        drawn = sheet.draw()
        tiles = min(length, count)
        columns, rows = min(3, tiles), -(-tiles // min(3, tiles))
        step = (SIZE[0] + CAPTION + GAP, SIZE[1] + GAP)
        assert drawn.shape == (rows * step[0] + GAP, columns * step[1] + GAP, 3)
        shown = []
        for place in range(tiles):
            y, x = GAP + place // columns * step[0], GAP + place % columns * step[1]
            shown.append(number_in(drawn[y : y + SIZE[0], x : x + SIZE[1]]))
        assert shown == sorted(set(shown))
        assert shown[0] == 0
        if tiles > 1:
            gaps = np.diff(shown)
            assert gaps.max() <= 2 * gaps.min()  # even, but for rounding
            assert length - shown[-1] <= 2 * gaps.max()


def test_a_contact_sheet_is_written_whole(tmp_path):
    sheet = ContactSheet(count=4)
    with pytest.raises(ValueError, match="at least one frame"):
        sheet.write(tmp_path / "sheet.jpg")
    for i in range(6):
        sheet.add(i, 3700.0 + i, np.zeros((600, 900, 3), np.uint8))
    for name in ("sheet.jpg", "sheet.png"):
        sheet.write(tmp_path / name)
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (4 * (360 + GAP) + GAP, 240 + CAPTION + 2 * GAP)
    with pytest.raises(ValueError, match="sheet.gif: name a contact sheet"):
        sheet.write(tmp_path / "sheet.gif")
    with pytest.raises(ValueError, match="must be positive"):
        ContactSheet(count=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sheet.jpg", "sheet.png"]
