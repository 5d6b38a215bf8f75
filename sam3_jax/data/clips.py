"""Clips for the tracker: some frames of a film with some of its objects, on one canvas.

As SAM 2 trains (arXiv 2408.00714): frames in a row, forwards or backwards, objects that are seen in
the first one (others of them may leave), every frame in the model's square, and one change of
geometry and colours for the whole clip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageEnhance
from pycocotools import mask as coco_mask

from sam3_jax.data.films import Film, Masklet
from sam3_jax.data.pictures import decode_as_annotated
from sam3_jax.data.placement import resize_mask
from sam3_jax.data.resize import resize_image
from sam3_jax.training.clip_batch import ClipBatch

TRIES = 100  # films in a row without a usable clip before reading stops


@dataclass
class ClipsConfig:
    """How clips are made. Probabilities and strengths of 0 switch a change off.

    ``max_stride``: frames between those of a clip are left out by a stride drawn from 1 to this, as
    far as the film is long enough. A film that is too short is played to and fro.
    """

    frames: int = 8
    max_stride: int = 1
    objects: int = 3
    resolution: int = 1008
    mask_size: int = 288
    reverse: float = 0.5
    flip: float = 0.5
    degrees: float = 25.0  # turned by up to so much
    shear: float = 20.0  # degrees
    affine: float = 1.0  # chance of the two
    brightness: float = 0.1  # factors from 1 - x to 1 + x
    contrast: float = 0.03
    saturation: float = 0.03
    gray: float = 0.05


class Clip(NamedTuple):
    """T frames with the masks of up to ``ClipsConfig.objects`` objects."""

    frames: UInt8[np.ndarray, "t s s 3"]
    masks: Bool[np.ndarray, "n t m m"]
    known: Bool[np.ndarray, "n t"]
    film_id: str


@runtime_checkable
class Films(Protocol):
    """A random-access sequence of films, such as a FilmSource."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Film: ...


class Change(NamedTuple):
    """What is done to every frame of a clip and its masks.

    ``matrix``: fractions of the canvas to fractions of the picture, (x, y, 1) -> (x, y); None:
    nothing but ``flip``.
    """

    flip: bool
    matrix: tuple[float, ...] | None
    brightness: float
    contrast: float
    saturation: float
    gray: bool


def draw_clip(films: Films, index: int, config: ClipsConfig, rng: np.random.Generator) -> Clip:
    """A clip of the ``index``-th film, or of the next one with an object to track.

    Raises:
      ValueError: when many films in a row have none.
    """
    for attempt in range(TRIES):
        film = films[(index + attempt) % len(films)]
        clip = clip_of(film, config, rng)
        if clip is not None:
            return clip
    raise ValueError(f"{TRIES} films in a row, from {film.film_id} backwards, show no object")


def clip_of(film: Film, config: ClipsConfig, rng: np.random.Generator) -> Clip | None:
    """A clip of a given film; None where nothing is to be seen."""
    numbers = draw_frames(film, config, rng)
    if numbers is None:
        return None
    change = draw_change(config, rng)
    seen = [m for m in film.masklets if m.masks[numbers[0]]]
    for attempt in (change, change._replace(matrix=None)):
        chosen: list[tuple[np.ndarray, np.ndarray]] = []
        for i in rng.permutation(len(seen)):
            if len(chosen) == config.objects:
                break
            masks = _masks(seen[i], numbers, film.size, attempt, config)
            if masks[0].any():  # turning may have moved it out of the canvas
                known = np.array([n not in seen[i].unknown for n in numbers])
                chosen.append((masks, known))
        if chosen:
            frames = [_frame(film, n, attempt, config) for n in numbers]
            masks, known = (np.stack(parts) for parts in zip(*chosen, strict=True))
            return Clip(np.stack(frames), masks, known, film.film_id)
    return None


def draw_frames(film: Film, config: ClipsConfig, rng: np.random.Generator) -> list[int] | None:
    """Numbers of a clip's frames, the first of which shows an object; None: no frame does."""
    length, count = len(film.names), config.frames
    shown = {i for m in film.masklets for i, mask in enumerate(m.masks) if mask}
    if not shown:
        return None
    longest = (length - 1) // (count - 1) if count > 1 else 1
    stride = int(rng.integers(1, max(1, min(config.max_stride, longest)) + 1))
    backward = rng.random() < config.reverse
    span = stride * (count - 1)
    if span < length:
        starts = range(span, length) if backward else range(length - span)
    else:
        starts = range(length)
    starts = [start for start in starts if start in shown] or sorted(shown)
    start = starts[int(rng.integers(len(starts)))]
    step = -stride if backward else stride
    return [_to_and_fro(start + step * i, length) for i in range(count)]


def _to_and_fro(number: int, length: int) -> int:
    """Turns round at both ends."""
    if length == 1:
        return 0
    number %= 2 * (length - 1)
    return min(number, 2 * (length - 1) - number)


def draw_change(config: ClipsConfig, rng: np.random.Generator) -> Change:
    """One change for a whole clip."""
    flip, warp, gray = rng.random(3) < (config.flip, config.affine, config.gray)
    turn, shear = (math.radians(rng.uniform(-x, x)) for x in (config.degrees, config.shear))
    matrix = None
    if warp and (config.degrees or config.shear):
        cos, sin, tan = math.cos(turn), math.sin(turn), math.tan(shear)
        a, b, c, d = cos, cos * tan - sin, sin, sin * tan + cos  # turned after it was sheared
        det = a * d - b * c
        a, b, c, d = d / det, -b / det, -c / det, a / det
        matrix = (a, b, 0.5 - 0.5 * (a + b), c, d, 0.5 - 0.5 * (c + d))
    factors = (
        rng.uniform(1 - x, 1 + x) for x in (config.brightness, config.contrast, config.saturation)
    )
    return Change(bool(flip), matrix, *factors, bool(gray))


def _frame(
    film: Film, number: int, change: Change, config: ClipsConfig
) -> UInt8[np.ndarray, "s s 3"]:
    pixels = decode_as_annotated(film.data[number], film.names[number], film.size)
    pixels = resize_image(pixels, (config.resolution, config.resolution))
    picture = Image.fromarray(pixels)
    if change.gray:
        picture = picture.convert("L").convert("RGB")
    for enhance, factor in (
        (ImageEnhance.Brightness, change.brightness),
        (ImageEnhance.Contrast, change.contrast),
        (ImageEnhance.Color, change.saturation),
    ):
        if factor != 1.0:
            picture = enhance(picture).enhance(factor)
    return np.asarray(_warp(picture, change))


def _masks(
    masklet: Masklet,
    numbers: Sequence[int],
    size: tuple[int, int],
    change: Change,
    config: ClipsConfig,
) -> Bool[np.ndarray, "t m m"]:
    side = (config.mask_size, config.mask_size)
    found = np.zeros((len(numbers), *side), bool)
    for place, number in enumerate(numbers):
        mask = masklet.masks[number]
        if mask is None:
            continue
        hard = resize_mask(coco_mask.decode(mask).astype(bool), side)
        if change.matrix is None and not change.flip:
            found[place] = hard
            continue
        picture = Image.fromarray(hard.astype(np.uint8) * 255)
        found[place] = np.asarray(_warp(picture, change)) >= 128
    return found


def _warp(picture: Image.Image, change: Change) -> Image.Image:
    if change.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if change.matrix is None:
        return picture
    a, b, x, c, d, y = change.matrix
    width, height = picture.size
    data = (a, b * width / height, x * width, c * height / width, d, y * height)
    return picture.transform(picture.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)


def collate_clips(clips: Sequence[Clip], *, objects: int) -> ClipBatch:
    """Pads and stacks clips; missing objects are no valid ones."""
    frames = np.stack([clip.frames for clip in clips])
    masks = np.zeros((len(clips), objects, *clips[0].masks.shape[1:]), bool)
    known = np.zeros((len(clips), objects, frames.shape[1]), bool)
    valid = np.zeros((len(clips), objects), bool)
    for row, clip in enumerate(clips):
        count = len(clip.masks)
        masks[row, :count], known[row, :count], valid[row, :count] = clip.masks, clip.known, True
    return ClipBatch(frames, masks, known, valid)
