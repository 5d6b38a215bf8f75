"""Writes the demo's clips: ``python -m sam3_jax.demo.clips OUTPUT``; see ``--help``."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from sam3_jax.demo.motion import Movie, is_seen_at_first, make_movie, masks_of, pictures_of
from sam3_jax.demo.objects import BASE_SIDE
from sam3_jax.inference.argument_values import parse_count, parse_positive
from sam3_jax.video.writer import open_writer

DESCRIPTION = """\
Draws clips of coloured shapes and handwritten digits that move over photographs, occlude each
other, leave the picture and come back, with exact masks of every object.

OUTPUT/train         annotations.json (YouTube-VIS) and JPEGImages: train.py reads them
OUTPUT/valid, test   held-out clips: Annotations and JPEGImages as DAVIS has them, for J&F of
                     objects that are given by their first masks; annotations.json (SA-Co VEval),
                     for HOTA and cgF1 of what phrases name. Other photographs and writers.

Takes some ten minutes on two cores. What is already there is kept.
"""
FILE, FRAMES, MASKS = "annotations.json", "JPEGImages", "Annotations"
COUNTS = {"valid": 12, "test": 40}
LENGTHS = {"train": 24, "valid": 32, "test": 32}
DIGESTS = {  # of the annotation files
    "valid": "acfe1dac60ab4cda6812f50ba420e9a0851fd4020cc3f6e7268e4d52e8f82c00",
    "test": "2abda8ad52bfb4265f95f79e8d515e4ef92dab172c898ee9134ab16d7ef81881",
}
QUALITY = 92  # of JPEG
RATE = Fraction(12)  # frames a second of a video file
LEAST = 80  # pixels in the first frame of an object that DAVIS' layout annotates
ROWS = 100  # room for a clip's pairs, and a pair's objects, in ids that are whole numbers

Entry = dict[str, Any]


def draw_movie(split: str, index: int, folder: Path, *, seed: int = 0) -> Entry:
    """Writes the frames of a clip, and of held-out ones DAVIS' masks; returns what is annotated."""
    movie = make_movie(split, index, LENGTHS[split], seed=seed)
    frames = folder / FRAMES / movie.name
    frames.mkdir(parents=True, exist_ok=True)
    for t, pixels in enumerate(pictures_of(movie, split, index, seed=seed)):
        Image.fromarray(pixels).save(frames / f"{t:05d}.jpg", quality=QUALITY)
    if split != "train":
        _write_labels(folder / MASKS / movie.name, masks_of(movie))
    return annotate(movie, index)


def write_video(path: Path, split: str, index: int, *, seed: int) -> Movie:
    """Draws a clip into a video file (see ``open_writer``) instead of a data set; returns it.

    Raises:
      OSError: when it cannot be written.
    """
    movie = make_movie(split, index, LENGTHS[split], seed=seed)
    with open_writer(path, (BASE_SIDE, BASE_SIDE), rate=RATE) as writer:
        for pixels in pictures_of(movie, split, index, seed=seed):
            writer.write(pixels)
    return movie


def annotate(movie: Movie, index: int) -> Entry:
    """A clip's name, its objects' run lengths and its phrases with their objects."""
    masks = masks_of(movie)
    tracks = [[_encoded(mask[n]) for mask in masks] for n in range(len(movie.frames[0]))]
    pairs = [(query.text, query.answers(movie.frames[0])) for query in movie.queries]
    return {"name": movie.name, "index": index, "tracks": tracks, "pairs": pairs}


def _write_labels(folder: Path, masks: Sequence[np.ndarray]) -> None:
    """Indexed PNGs: label n + 1 for the n-th object that the first frame shows."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = is_seen_at_first(masks, LEAST)
    rng = np.random.default_rng(0)
    palette = [0, 0, 0, *rng.integers(40, 256, 3 * 255).tolist()]
    for t, found in enumerate(masks):
        labels = np.zeros(found.shape[1:], np.uint8)
        for label, number in enumerate(shown, 1):
            labels[found[number]] = label
        picture = Image.fromarray(labels, "P")
        picture.putpalette(palette)
        picture.save(folder / f"{t:05d}.png")


def _encoded(mask: np.ndarray) -> Entry | None:
    if not mask.any():
        return None
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode("ascii")}


def annotations_of(entries: Iterable[Entry], split: str) -> str:
    """The text of the annotation file: YouTube-VIS for training, SA-Co VEval for held-out clips."""
    videos, annotations, named = [], [], []
    phrases: dict[str, int] = {}
    for entry in entries:
        number, length = entry["index"] + 1, LENGTHS[split]
        names = [f"{entry['name']}/{t:05d}.jpg" for t in range(length)]
        size = {"height": BASE_SIDE, "width": BASE_SIDE}
        videos.append({"id": number, "video_name": entry["name"], **size, "length": length})
        videos[-1]["file_names"] = names
        everything = [("object", range(len(entry["tracks"])))]
        pairs = everything if split == "train" else entry["pairs"]
        for place, (phrase, answers) in enumerate(pairs):
            category = phrases.setdefault(phrase, len(phrases) + 1)
            named.append({"video_id": number, "category_id": category, "noun_phrase": phrase})
            for answer in answers:
                if any(entry["tracks"][answer]):
                    key = (number * ROWS + place) * ROWS + answer
                    annotations.append(_annotation(key, number, category, entry["tracks"][answer]))
    content = {
        "info": {"description": "sam3_jax demo", "split": split, "videos": len(videos)},
        "videos": videos,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for name, i in phrases.items()],
    }
    if split != "train":
        content["video_np_pairs"] = named
    return json.dumps(content, separators=(",", ":")) + "\n"


def _annotation(key: int, video: int, category: int, track: Sequence[Entry | None]) -> Entry:
    boxes = [coco_mask.toBbox(mask).tolist() if mask else None for mask in track]
    areas = [int(coco_mask.area(mask)) if mask else None for mask in track]
    return {
        "id": key,
        "video_id": video,
        "category_id": category,
        "iscrowd": 0,
        "height": BASE_SIDE,
        "width": BASE_SIDE,
        "segmentations": list(track),
        "bboxes": boxes,
        "areas": areas,
    }


def write_clips(
    folder: Path, split: str, count: int, *, seed: int = 0, workers: int = 1
) -> tuple[Path, bool]:
    """Writes a split, or finds it already written; returns the annotation file.

    The annotation file is written last, so that its presence says that the frames are there. Beside
    it, whether the file is the published one (of training clips: true).
    """
    file = folder / FILE
    settings = folder / "settings.json"
    wanted = {"split": split, "count": count, "seed": seed, "length": LENGTHS[split]}
    if file.is_file() and settings.is_file() and json.loads(settings.read_text()) == wanted:
        return file, _is_published(file, split, count)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    draw = functools.partial(draw_movie, split, folder=folder, seed=seed)
    entries = list(_map(draw, count, workers, split))
    text = annotations_of(entries, split)
    settings.write_text(json.dumps(wanted) + "\n")
    file.write_text(text, encoding="utf-8")
    return file, _is_published(file, split, count)


def _map(draw: Any, count: int, workers: int, split: str) -> Iterator[Entry]:
    bar = functools.partial(tqdm, total=count, desc=split, unit=" clips", mininterval=1.0)
    if workers == 1:
        yield from bar(map(draw, range(count)))
        return
    # "spawn": the caller may have threads, which do not survive a fork.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from bar(pool.imap(draw, range(count)))


def _is_published(file: Path, split: str, count: int) -> bool:
    if split == "train":
        return True
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return count == COUNTS[split] and digest == DIGESTS[split]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = _parser().parse_args(argv)
    counts = {split: args.held_out or count for split, count in COUNTS.items()}
    if args.train:
        counts["train"] = args.train
    try:
        for split, count in counts.items():
            seed = args.seed if split == "train" else 0
            file, published = write_clips(
                args.output / split, split, count, seed=seed, workers=args.workers
            )
            print(file)
            if not published:
                print(f"warning: {file} is not the published set", file=sys.stderr)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"error: {error}; pip install 'sam3_jax[demo]'", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sam3_jax.demo.clips",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("output", type=Path, help="folder to write to")
    add("--train", type=parse_count, default=600, help="training clips (default 600; 0: none)")
    add(
        "--held-out",
        type=parse_count,
        default=0,
        help="clips of each held-out set (0: all of them)",
    )
    add("--seed", type=parse_count, default=0, help="of the training clips (default 0)")
    add(
        "--workers",
        type=parse_positive,
        default=os.cpu_count() or 1,
        help="processes that draw (default: one a CPU)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
