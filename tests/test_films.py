"""Videos with masklets: read from both layouts, written once, read back, cut into clips."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

import film_files
import video_clips
from sam3_jax.data.builder import Source
from sam3_jax.data.clip_pipeline import make_clip_pipeline
from sam3_jax.data.clips import (
    Change,
    ClipsConfig,
    clip_of,
    collate_clips,
    draw_change,
    draw_frames,
)
from sam3_jax.data.film_annotations import load_films
from sam3_jax.data.film_builder import prepare_films
from sam3_jax.data.film_source import open_films
from sam3_jax.data.films import Film, Masklet, pieces
from sam3_jax.data.images import load_image
from sam3_jax.data.pipeline import DataConfig
from sam3_jax.data.records import AnnotationError

FRAMES = film_files.FRAMES
PLAIN = ClipsConfig(
    frames=4, objects=2, resolution=64, mask_size=32, reverse=0.0, flip=0.0, affine=0.0,
    brightness=0.0, contrast=0.0, saturation=0.0, gray=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of two films."""
    folder = tmp_path_factory.mktemp("ytvis")
    file = film_files.write_ytvis(folder)
    return prepare_films({"train": Source(file)}, folder / "data", "films")


def edited(folder, change):
    """The annotation file with something done to it."""
    file = film_files.write_ytvis(folder)
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return file


def decoded(film: Film, number: int, frame: int) -> np.ndarray:
    return coco_mask.decode(film.masklets[number].masks[frame]).astype(bool)


def test_youtube_vis_comes_back_as_it_was(written):
    films = open_films(written, "train")
    assert len(films) == 2
    film = films[0]
    assert (film.size, len(film.data), [m.id for m in film.masklets][1][-1]) == ((48, 64), 6, "1")
    for frame in range(FRAMES):
        moving, still = film_files.truth(frame)
        np.testing.assert_array_equal(decoded(film, 0, frame), moving)
        assert (film.masklets[1].masks[frame] is None) == (still is None)


def test_it_is_written_once_and_not_from_other_files(tmp_path):
    file = film_files.write_ytvis(tmp_path, videos=1)
    folder = prepare_films({"train": Source(file)}, tmp_path / "data", "films")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare_films({"train": Source(file)}, tmp_path / "data", "films") == folder
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    file.write_text(file.read_text() + " ")
    with pytest.raises(AnnotationError, match="written from other annotations"):
        prepare_films({"train": Source(file)}, tmp_path / "data", "films")
    with pytest.raises(AnnotationError, match="no split named 'valid'"):
        open_films(folder, "valid")


def test_sa_v_takes_every_fourth_frame_of_a_video(tmp_path):
    folder = film_files.write_sav(tmp_path / "sav")
    films, problems = load_films(folder, max_bad=0.0)
    assert not problems.found
    assert films[0].names[:2] == ("sav_000001#0", "sav_000001#4")
    path = prepare_films({"train": Source(folder)}, tmp_path / "data", "films")
    film = open_films(path, "train")[0]
    assert len(film.data) == 6
    place = tmp_path / "frame.jpg"
    for number, data in enumerate(film.data):
        place.write_bytes(data)
        assert video_clips.number_in(load_image(place)) == 4 * number


def test_a_damaged_mask_is_unknown_and_a_damaged_masklet_left_out(tmp_path):
    def spoil(content):
        content["annotations"][0]["segmentations"][2]["counts"] = "not run lengths"
        content["annotations"][1]["segmentations"] = [None] * FRAMES
        content["annotations"].append({"id": 99, "video_id": 77, "segmentations": []})
        content["annotations"].append("nonsense")
        content["videos"].append({"id": 3, "height": 4, "width": 4})

    films, problems = load_films(edited(tmp_path, spoil), max_bad=1.0)
    assert [len(film.masklets) for film in films] == [1, 2]
    assert films[0].masklets[0].unknown == {2}
    assert problems.found == {
        "video without file_names": ["video 2"],
        "broken run-length encoding": ["annotation 10 frame 2"],
        "a masklet that is in no frame": ["annotation 11"],
        "annotation of an unknown video": ["annotation 99"],
        "annotation without video_id": ["annotation 5"],
    }
    with pytest.raises(AnnotationError, match="5 of 9 entries cannot be used"):
        load_films(tmp_path / "instances.json", max_bad=0.1)


def test_frames_that_cannot_be_read_are_left_out(tmp_path, capsys):
    file = film_files.write_ytvis(tmp_path)
    (tmp_path / "JPEGImages" / "v1" / "00001.jpg").unlink()
    (tmp_path / "JPEGImages" / "v2" / "00003.jpg").write_bytes(b"no picture")
    with pytest.raises(AnnotationError, match="2 of 12 entries"):
        prepare_films({"train": Source(file)}, tmp_path / "data", "strict")
    path = prepare_films({"train": Source(file)}, tmp_path / "data", "films", max_bad=0.2)
    source = open_films(path, "train")
    films = {film.film_id: film for film in (source[i] for i in range(len(source)))}
    assert [name[-9:] for name in films["1"].names] == [f"{i:05d}.jpg" for i in (0, 2, 3, 4, 5)]
    np.testing.assert_array_equal(decoded(films["1"], 0, 1), film_files.truth(2)[0])
    assert "missing frame: 1" in capsys.readouterr().err


def test_files_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(AnnotationError, match="NAME_manual.json"):
        load_films(tmp_path / "empty", max_bad=0.1)
    file = tmp_path / "coco.json"
    file.write_text('{"images": [], "annotations": []}')
    with pytest.raises(AnnotationError, match="no lists named videos"):
        load_films(file, max_bad=0.1)
    folder = film_files.write_sav(tmp_path / "sav", masklets=[[None]] * 6)
    with pytest.raises(AnnotationError, match="no video with a usable masklet"):
        load_films(folder, max_bad=1.0)


def test_long_films_are_parted():
    mask = {"size": [4, 4], "counts": b"0:"}
    masklets = (Masklet("a", (mask,) * 7), Masklet("b", (*(None,) * 5, mask, None), frozenset({6})))
    film = Film("x", (4, 4), tuple("0123456"), masklets)
    assert pieces(film, 7) == [film]
    first, second = pieces(film, 4)
    assert (first.film_id, first.names) == ("x/0", ("0", "1", "2"))
    assert [m.id for m in first.masklets] == ["a"]
    assert second.masklets[1] == Masklet("b", (None, None, mask, None), frozenset({3}))


def test_frames_of_a_clip_follow_each_other_from_one_that_shows_something(written):
    film = open_films(written, "train")[0]
    late = film._replace(masklets=(Masklet("a", (*(None,) * 2, *film.masklets[0].masks[2:])),))
    rng, config = np.random.default_rng(0), dataclasses.replace(PLAIN, frames=3)
    assert {tuple(draw_frames(late, config, rng)) for _ in range(50)} == {(2, 3, 4), (3, 4, 5)}
    config.reverse, config.max_stride = 1.0, 2
    found = {tuple(draw_frames(late, config, rng)) for _ in range(200)}
    assert found == {(2, 1, 0), (3, 2, 1), (4, 3, 2), (5, 4, 3), (4, 2, 0), (5, 3, 1)}
    config.reverse, config.frames = 0.0, 8  # longer than the film: to and fro
    assert draw_frames(late, config, rng)[-2:] in ([2, 1], [1, 0], [0, 1], [1, 2])
    assert draw_frames(film._replace(masklets=()), config, rng) is None


def test_a_clip_shows_what_its_masks_say(written):
    film = open_films(written, "train")[0]
    unknown = film.masklets[0]._replace(unknown=frozenset({1}))
    film = film._replace(masklets=(unknown, film.masklets[1]))
    clip = clip_of(film, dataclasses.replace(PLAIN, frames=6), np.random.default_rng(0))
    assert clip.frames.shape == (6, 64, 64, 3)
    red = 0 if clip.masks[0, 5].any() else 1  # the other one is gone by then
    for frame in range(6):
        inside = clip.masks[red, frame].repeat(2, 0).repeat(2, 1)
        assert clip.frames[frame][inside].mean(0)[0] > 180
    assert clip.known[red].tolist() == [True, False, True, True, True, True]
    batch = collate_clips([clip], objects=3)
    assert batch.valid.tolist() == [[True, True, False]]
    assert batch.masks.shape == (1, 3, 6, 32, 32)


def test_pixels_and_masks_change_together(written):
    """A turned, sheared and mirrored clip still has its masks on the red object."""
    film = open_films(written, "train")[0]._replace()
    film = film._replace(masklets=film.masklets[:1])
    config = dataclasses.replace(PLAIN, flip=0.5, affine=1.0, resolution=128, mask_size=128)
    rng, seen = np.random.default_rng(1), 0
    for _ in range(8):
        clip = clip_of(film, config, rng)
        for frame, mask in zip(clip.frames, clip.masks[0], strict=True):
            red = (frame[..., 0] > 150) & (frame[..., 2] < 90)
            if mask.sum() > 400:
                seen += 1
                assert (red & mask).sum() / (red | mask).sum() > 0.9  # edges are blurred
    assert seen > 20


def test_one_change_for_a_whole_clip():
    change = draw_change(ClipsConfig(), np.random.default_rng(0))
    assert isinstance(change, Change)
    a, b, x, c, d, y = change.matrix
    # The middle of the picture stays where it is.
    np.testing.assert_allclose([a / 2 + b / 2 + x, c / 2 + d / 2 + y], 0.5)
    still = draw_change(PLAIN, np.random.default_rng(0))
    assert still == Change(False, None, 1.0, 1.0, 1.0, False)


def test_batches_go_on_where_they_stopped(written):
    config = DataConfig(folder=str(written), batch_size=2, threads=1)
    clips = dataclasses.replace(PLAIN, reverse=0.5, flip=0.5)
    whole = iter(make_clip_pipeline(config, clips))
    first = [next(whole) for _ in range(4)]
    again = iter(make_clip_pipeline(config, clips, start=2))
    for expected in first[2:]:
        for ours, theirs in zip(next(again), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    # Two processes make the same clips, each its own.
    halves = [
        next(iter(make_clip_pipeline(
            dataclasses.replace(config, batch_size=1), clips, process_index=i, process_count=2
        )))
        for i in range(2)
    ]  # fmt: skip
    np.testing.assert_array_equal(np.concatenate([half.frames for half in halves]), first[0].frames)
    with pytest.raises(ValueError, match=r"clips\.frames=0"):
        make_clip_pipeline(config, dataclasses.replace(PLAIN, frames=0))
