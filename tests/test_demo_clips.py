"""The demo's clips: objects that move, hide each other, leave and come back, with exact masks."""

from __future__ import annotations

import hashlib
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from sam3_jax.data.film_annotations import load_films
from sam3_jax.demo import clips, motion
from sam3_jax.evaluation.video.annotations import load_video_annotations
from sam3_jax.evaluation.video.davis_folders import sequences_folder

LENGTH = 32


@pytest.fixture(scope="module")
def movies() -> list[motion.Movie]:
    return [motion.make_movie("test", i, LENGTH) for i in range(12)]


def test_a_clip_is_the_same_every_time_and_every_one_another(movies):
    assert motion.make_movie("test", 3, LENGTH) == movies[3]
    assert motion.make_movie("test", 3, LENGTH, seed=1) != movies[3]
    assert motion.make_movie("valid", 3, LENGTH).frames != movies[3].frames
    assert len({movie.frames for movie in movies}) == len(movies)
    assert motion.make_movie("test", 3, 8).frames == movies[3].frames[:8]


def test_objects_move_smoothly_leave_come_back_and_hide_each_other(movies):
    left, returned, hidden = 0, 0, 0
    for movie in movies:
        places = np.array([[(o.x, o.y) for o in objects] for objects in movie.frames])
        assert np.abs(np.diff(places, axis=0)).max() < 30  # pixels a frame
        masks = np.stack(motion.masks_of(movie), 1)
        areas = masks.sum((2, 3))
        for n, area in enumerate(areas):
            gone = np.flatnonzero(area == 0)
            left += bool(len(gone))
            returned += bool(len(gone)) and bool(area[gone[-1] :].any())
            alone = motion.masks_of(movie._replace(frames=tuple((f[n],) for f in movie.frames)))
            hidden += any(mask.sum() > 1.3 * a for mask, a in zip(alone, area, strict=True))
    assert left >= 3
    assert returned >= 2
    assert hidden >= 5


def test_held_out_clips_are_what_the_measures_read(tmp_path, monkeypatch):
    monkeypatch.setitem(clips.LENGTHS, "valid", 4)
    file, published = clips.write_clips(tmp_path / "valid", "valid", 2)
    assert not published
    assert sequences_folder(tmp_path / "valid") == tmp_path / "valid" / "Annotations"
    dataset = load_video_annotations(file)
    assert (dataset.layout, len(dataset.videos), dataset.problems.found) == ("saco", 2, {})
    assert any(pair.targets for pair in dataset.pairs.values())
    assert any(not pair.targets for pair in dataset.pairs.values())
    for number, video in dataset.videos.items():
        frames = sorted((tmp_path / "valid" / "JPEGImages" / video.name).iterdir())
        assert [frame.name for frame in frames] == [f"{i:05d}.jpg" for i in range(4)]
        truth = motion.masks_of(motion.make_movie("valid", number - 1, 4))
        shown = motion.is_seen_at_first(truth, clips.LEAST)
        folder = tmp_path / "valid" / "Annotations" / video.name
        for t, path in enumerate(sorted(folder.iterdir())):
            labels = np.asarray(Image.open(path))
            for label, n in enumerate(shown, 1):
                np.testing.assert_array_equal(labels == label, truth[t][n])
    before = file.stat().st_mtime_ns
    assert clips.write_clips(tmp_path / "valid", "valid", 2)[0].stat().st_mtime_ns == before


def test_a_clip_as_a_video(tmp_path, monkeypatch):
    """The file holds the movie's frames; H.264 changes a pixel by a few levels."""
    monkeypatch.setitem(clips.LENGTHS, "test", 5)
    movie = clips.write_video(tmp_path / "clip.mp4", "test", 2, seed=7)
    assert movie == motion.make_movie("test", 2, 5, seed=7)
    drawn = motion.pictures_of(movie, "test", 2, seed=7)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].average_rate == clips.RATE
        read = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(read) == len(drawn) == 5
    for ours, theirs in zip(read, drawn, strict=True):
        assert np.abs(ours.astype(int) - theirs).mean() < 6
    with pytest.raises(OSError, match="clip.mp4"):
        clips.write_video(tmp_path / "clip.mp4" / "clip.mp4", "test", 2, seed=7)


def test_training_clips_have_every_object(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(clips.LENGTHS, "train", 3)
    monkeypatch.setattr(clips, "COUNTS", {})
    assert clips.main([str(tmp_path), "--train", "2", "--workers", "1"]) == 0
    file = Path(capsys.readouterr().out.strip())
    films, problems = load_films(file, max_bad=0.0)
    assert not problems.found
    for index, film in enumerate(films):
        truth = motion.masks_of(motion.make_movie("train", index, 3))
        ever = [n for n in range(truth[0].shape[0]) if any(mask[n].any() for mask in truth)]
        assert len(film.masklets) == len(ever)
        for masklet, n in zip(film.masklets, ever, strict=True):
            for t, mask in enumerate(masklet.masks):
                found = coco_mask.decode(mask) if mask else np.zeros_like(truth[t][n])
                np.testing.assert_array_equal(found.astype(bool), truth[t][n])


def test_the_published_sets_have_not_changed():
    """Without the pictures, which the annotations do not depend on."""
    assert set(clips.DIGESTS) == set(clips.COUNTS)
    entries = [clips.annotate(motion.make_movie("valid", i, 32), i) for i in range(12)]
    text = clips.annotations_of(entries, "valid")
    assert hashlib.sha256(text.encode()).hexdigest() == clips.DIGESTS["valid"]
