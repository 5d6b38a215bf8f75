"""One training example: pictures on a canvas, what is asked about it, and the answers.

The order is that of the decisions: which pictures (one, or a mosaic), which phrases, where the
pictures go; only then pixels are touched, and masks only of the phrases that were chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8
from pycocotools import mask as coco_mask

from sam3_jax.data.augment import (
    AugmentConfig,
    draw_grid,
    draw_placements,
    jitter_colors,
    names_color,
    remove_colors,
)
from sam3_jax.data.clicks import first_click
from sam3_jax.data.pictures import decode_as_annotated
from sam3_jax.data.placement import (
    Placement,
    box_of_mask,
    is_cut,
    place_boxes,
    place_image,
    place_mask,
    resize_mask,
)
from sam3_jax.data.records import Instance
from sam3_jax.data.sampling import (
    VISUAL,
    Candidate,
    SamplingConfig,
    candidates,
    choose,
    draw_exemplars,
    noisy_box,
)
from sam3_jax.data.scenes import Scene
from sam3_jax.data.source import SceneSource
from sam3_jax.training.batch import Clicks

MIN_SIDE = 0.5  # pixels of the canvas: smaller boxes cannot be learned
TRIES = 100  # pictures in a row without a usable phrase before reading stops


@dataclass
class ExampleConfig:
    """How examples are made of pictures."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mask_size: int = 0  # side of the target masks; 0: none, as in the released fine-tuning
    clicks: int = 0  # objects of an image that the interactive head learns from


class Prompt(NamedTuple):
    """A question about the canvas, and its answer. Boxes are (x0, y0, x1, y1) in pixels."""

    phrase: str  # "visual" where boxes replace it
    concept: str  # the phrase it is about
    pair_id: str
    exhaustive: bool
    boxes: Float32[np.ndarray, "n 4"]
    masks: Bool[np.ndarray, "n m m"]
    mask_valid: Bool[np.ndarray, " n"]
    semantic: Bool[np.ndarray, "m m"]
    exemplars: Float32[np.ndarray, "e 4"]
    exemplar_labels: Int32[np.ndarray, " e"]


class Example(NamedTuple):
    """A canvas with its prompts; ``files`` are the names of its pictures."""

    image: UInt8[np.ndarray, "s s 3"]
    prompts: tuple[Prompt, ...]
    clicks: Clicks
    files: tuple[str, ...]


class _Target(NamedTuple):
    """An instance on the canvas."""

    box: np.ndarray
    mask: np.ndarray | None  # at mask size
    source_box: np.ndarray  # (x0, y0, x1, y1) in its picture
    picture: int


def draw_example(
    source: SceneSource, index: int, config: ExampleConfig, rng: np.random.Generator
) -> Example:
    """An example of the ``index``-th picture, or of the next one with a usable phrase.

    Raises:
      ValueError: when many pictures in a row have none.
    """
    for attempt in range(TRIES):
        scene = source[(index + attempt) % len(source)]
        rows, columns = draw_grid(config.augment, rng)
        others = rng.integers(len(source), size=rows * columns - 1)
        scenes = [scene, *(source[i] for i in others)]
        scenes = [scenes[i] for i in rng.permutation(len(scenes))]
        example = example_of(scenes, (rows, columns), source, config, rng)
        if example is None and len(scenes) > 1:
            example = example_of([scene], (1, 1), source, config, rng)
        if example is not None:
            return example
    raise ValueError(
        f"{TRIES} pictures in a row, from {scene.picture.file_name} backwards, have no usable "
        f"phrase: none, only crowds, or more than {config.sampling.max_targets} targets"
    )


def example_of(
    scenes: Sequence[Scene],
    grid: tuple[int, int],
    source: SceneSource,
    config: ExampleConfig,
    rng: np.random.Generator,
) -> Example | None:
    """An example of given pictures, row by row; None where they leave nothing to ask."""
    sampling, augment = config.sampling, config.augment
    positive, negative = candidates(scenes, source.vocabulary, sampling.max_targets)
    gray = bool(augment.gray) and rng.random() < augment.gray
    gray = gray and not all(names_color(c.phrase) for c in positive)
    if gray:
        positive, negative = (
            [c for c in found if not names_color(c.phrase)] for found in (positive, negative)
        )
    chosen = choose(positive, negative, source.vocabulary, sampling, rng)
    if not chosen:
        return None
    phrases = [candidate.phrase for candidate in chosen]
    sizes = [scene.picture.size for scene in scenes]
    placements = draw_placements(sizes, grid, phrases, augment, rng)
    known: dict[tuple, _Target | str] = {}
    found = [_targets(c, placements, config, known) for c in chosen]
    kept = [(c, t) for c, t in zip(chosen, found, strict=True) if t is not None]
    if not kept:
        return None
    prompts = []
    for candidate, targets in kept:
        others = [t for c, own in kept if c is not candidate for t in own]
        prompts.append(_prompt(candidate, targets, others, sizes, placements, config, rng))
    image = np.zeros((augment.resolution, augment.resolution, 3), np.uint8)
    for scene, placement in zip(scenes, placements, strict=True):
        name = scene.picture.file_name
        place_image(image, decode_as_annotated(scene.data, name, scene.picture.size), placement)
    image = jitter_colors(image, phrases, augment, rng)
    image = remove_colors(image) if gray else image
    clicks = _clicks([t for _, own in kept for t in own], config, rng)
    return Example(image, tuple(prompts), clicks, tuple(s.picture.file_name for s in scenes))


def _targets(
    candidate: Candidate,
    placements: Sequence[Placement],
    config: ExampleConfig,
    known: dict[tuple, _Target | str],
) -> list[_Target] | None:
    """What of a candidate is on the canvas; None where the answer is not known any more.

    That is so when nothing is left although not everything was cropped away: too small to see,
    hidden in a crowd, or not annotated. Several phrases may mean the same object: ``known`` keeps
    what was found out.
    """
    placed, lost = [], not candidate.exhaustive
    for number, instance in candidate.targets:
        key = (number, instance.box, instance.rle and instance.rle["counts"])
        if key not in known:
            known[key] = _target(instance, number, placements[number], config)
        target = known[key]
        if isinstance(target, _Target):
            placed.append(target)
        lost = lost or target == "small"
    return placed if placed or not lost else None


def _target(
    instance: Instance, number: int, placement: Placement, config: ExampleConfig
) -> _Target | str:
    """An instance on the canvas, or why it is not there: "small" or "outside"."""
    x, y, width, height = instance.box
    source_box = np.array([x, y, x + width, y + height], np.float64)
    (box,) = place_boxes(source_box[None], placement)
    side, mask = config.augment.resolution, None
    cut = is_cut(source_box, placement)
    if instance.rle is not None and (config.mask_size or cut):
        mask = place_mask(coco_mask.decode(instance.rle).astype(bool), placement, (side, side))
        if cut:  # the visible part of a mask can end before the crop does
            tight = box_of_mask(mask)
            if tight is None:
                return "outside"
            box = tight
        mask = resize_mask(mask, (config.mask_size,) * 2) if config.mask_size else None
    if (box[2:] - box[:2]).min() < MIN_SIDE:
        return "outside" if (box[2:] <= box[:2]).any() else "small"
    return _Target(box, mask if mask is not None and mask.any() else None, source_box, number)


def _prompt(
    candidate: Candidate,
    targets: Sequence[_Target],
    others: Sequence[_Target],
    sizes: Sequence[tuple[int, int]],
    placements: Sequence[Placement],
    config: ExampleConfig,
    rng: np.random.Generator,
) -> Prompt:
    size = (config.mask_size, config.mask_size)
    visual, positive, negative = draw_exemplars(
        candidate.phrase, len(targets), len(others), config.sampling, rng
    )
    exemplars = [targets[i] for i in positive] + [others[i] for i in negative]
    boxes = []
    for target in exemplars:
        drawn = noisy_box(target.source_box, sizes[target.picture], config.sampling, rng)
        (box,) = place_boxes(drawn[None], placements[target.picture])
        boxes.append(box if (box[2:] - box[:2]).min() >= MIN_SIDE else target.box)
    empty = np.zeros(size, bool)
    masks = [empty if t.mask is None else t.mask for t in targets]
    semantic = np.logical_or.reduce([empty, *masks])
    for number, crowd in candidate.crowds if config.mask_size else ():
        side = (config.augment.resolution,) * 2
        if crowd.rle is not None:
            whole = coco_mask.decode(crowd.rle).astype(bool)
            semantic |= resize_mask(place_mask(whole, placements[number], side), size)
    return Prompt(
        VISUAL if visual else candidate.phrase,
        candidate.phrase,
        candidate.pair_id,
        candidate.exhaustive,
        _boxes([t.box for t in targets]),
        np.stack(masks) if masks else np.zeros((0, *size), bool),
        np.array([t.mask is not None for t in targets], bool),
        semantic,
        _boxes(boxes),
        np.array([1] * len(positive) + [0] * len(negative), np.int32),
    )


def _clicks(targets: Sequence[_Target], config: ExampleConfig, rng: np.random.Generator) -> Clicks:
    """Half of the objects are meant by a point on them, half by a noisy box."""
    count, size = config.clicks, config.mask_size
    clicks = Clicks(
        np.zeros((count, 2, 2), np.float32),
        np.full((count, 2), -2, np.int32),
        np.zeros((count, size, size), bool),
        np.zeros(count, bool),
    )
    usable = [t for t in targets if t.mask is not None]
    resolution = config.augment.resolution
    for slot, index in enumerate(rng.permutation(len(usable))[:count]):
        target = usable[index]
        if rng.random() < 0.5:
            clicks.points[slot, 0] = first_click(target.mask, rng) * (resolution / size)
            clicks.labels[slot, 0] = 1
        else:
            box = noisy_box(target.box, (resolution, resolution), config.sampling, rng)
            clicks.points[slot] = box.reshape(2, 2)
            clicks.labels[slot] = (2, 3)
        clicks.masks[slot] = target.mask
        clicks.valid[slot] = True
    return clicks


def _boxes(boxes: Sequence[np.ndarray]) -> Float32[np.ndarray, "n 4"]:
    return np.asarray(boxes, np.float32).reshape(-1, 4)
