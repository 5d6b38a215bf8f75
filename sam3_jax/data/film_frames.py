"""The frames of films as bytes of image files: from files, from folders, out of videos.

Frames out of videos are stored as JPEG of high quality.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from sam3_jax.data.annotations import image_path
from sam3_jax.data.film_annotations import frame_number
from sam3_jax.data.films import Film
from sam3_jax.data.images import ImageError
from sam3_jax.data.pictures import decode_as_annotated
from sam3_jax.data.records import AnnotationError, Problems
from sam3_jax.inference.files import SUFFIXES, VIDEO_SUFFIXES
from sam3_jax.video.reader import VideoError, open_video

JPEG_QUALITY = 95


def with_frames(
    films: Sequence[Film], folder: Path, problems: Problems, limit: float
) -> Iterator[Film]:
    """Films with the bytes of their frames, one after the other.

    A frame that is missing or unusable is left out of its film, and reported.

    Raises:
      AnnotationError: as soon as more than the share ``limit`` of all frames is.
    """
    total, used = sum(len(film.names) for film in films), False
    for film in films:
        data: list[bytes | None] = []
        for name, found in zip(film.names, _frames(film, folder), strict=True):
            if isinstance(found, str):
                problems.add(found, f"{film.film_id} {name}")
                problems.check(f"{folder} (the folder of the frames)", total, limit)
                found = None
            data.append(found)
        good = [number for number, found in enumerate(data) if found is not None]
        filled = film._replace(data=tuple(found or b"" for found in data)).keep(good)
        if any(any(masklet.masks) for masklet in filled.masklets):
            used = True
            yield filled
    if not used:
        raise AnnotationError(f"{folder}: there is no frame with an object in it to learn from")


def _frames(film: Film, folder: Path) -> Iterator[bytes | str]:
    """Bytes of each frame, or what is wrong with it."""
    place = frame_number(film.names[0])
    if place is None:
        yield from (_file(image_path(folder, name), film.size) for name in film.names)
        return
    numbers = [frame_number(name)[1] for name in film.names]
    pictures = folder / place[0]
    if pictures.is_dir():
        files = sorted(f for f in pictures.iterdir() if f.suffix.lower() in SUFFIXES)
        found = (files[n] if n < len(files) else None for n in numbers)
        yield from (_file(file, film.size) for file in found)
        return
    candidates = (pictures.with_name(pictures.name + suffix) for suffix in VIDEO_SUFFIXES)
    video = next((path for path in candidates if path.is_file()), None)
    if video is None:
        yield from ("missing video" for _ in numbers)
        return
    yield from _out_of_video(video, numbers, film.size)


def _file(path: Path | None, size: tuple[int, int]) -> bytes | str:
    if path is None:
        return "missing frame"
    try:
        data = path.read_bytes()
        decode_as_annotated(data, str(path), size)
    except (OSError, ImageError) as error:
        print(f"warning: {error}", file=sys.stderr)
        return "unusable frame"
    return data


def _out_of_video(path: Path, numbers: list[int], size: tuple[int, int]) -> Iterator[bytes | str]:
    found: dict[int, bytes | str] = {}
    wanted = set(numbers)
    try:
        with contextlib.closing(open_video(path)) as video:
            for frame in video.frames(0, max(numbers) + 1):
                if frame.index not in wanted:
                    continue
                if frame.image is None:
                    found[frame.index] = "unusable frame"
                elif frame.image.shape[:2] != size:
                    found[frame.index] = "frame of another size than its masks"
                else:
                    file = io.BytesIO()
                    Image.fromarray(frame.image).save(file, "JPEG", quality=JPEG_QUALITY)
                    found[frame.index] = file.getvalue()
    except VideoError as error:
        print(f"warning: {error}", file=sys.stderr)
    yield from (found.get(number, "missing frame") for number in numbers)
