"""One picture of the demo's data: objects, phrases with their answers, pixels.

A pure function of the split, a seed and an index: the same everywhere, in any order, in any number
of processes. Objects, phrases and background have a stream of chance each, so that one of them
can be drawn without the others.
"""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from pycocotools import mask as coco_mask

from sam3_jax.data.masks import mask_box
from sam3_jax.data.records import Instance, Picture
from sam3_jax.data.scenes import Pair, Scene
from sam3_jax.demo.backgrounds import draw_background
from sam3_jax.demo.layout import SceneConfig, draw_objects
from sam3_jax.demo.objects import Object
from sam3_jax.demo.phrases import Query, draw_queries, unseen_queries
from sam3_jax.demo.render import render, visible_masks

SPLITS = ("train", "valid", "test", "unseen")  # in the order of their streams: append only
PAIRS = 100  # room for a picture's pairs and a pair's instances in ids that are whole numbers
OBJECTS, PHRASES, PIXELS = range(3)


def objects_of(config: SceneConfig, split: str, index: int, seed: int = 0) -> tuple[Object, ...]:
    """The objects of a picture."""
    return draw_objects(
        config,
        _chance(split, index, seed, OBJECTS),
        held_out=split != "train",
        unseen=split == "unseen",
    )


def queries_of(
    config: SceneConfig, split: str, index: int, objects: tuple[Object, ...], seed: int = 0
) -> list[Query]:
    """What is asked about it."""
    rng = _chance(split, index, seed, PHRASES)
    if split == "unseen":
        return unseen_queries(objects, config.positives // 2, config.negatives // 2, rng)
    return draw_queries(
        objects, config.positives, config.negatives, config.hard, rng, words=config.words
    )


def pixels_of(
    config: SceneConfig, split: str, index: int, objects: tuple[Object, ...], seed: int = 0
) -> UInt8[np.ndarray, "s s 3"]:
    """The picture, in RGB. Other objects on the same background make a film."""
    rng = _chance(split, index, seed, PIXELS)
    return render(objects, draw_background(config.side, rng, held_out=split != "train"))


def annotate(config: SceneConfig, split: str, index: int, seed: int = 0) -> Scene:
    """A scene without its picture, which takes the longest to make."""
    return _annotated(config, split, index, seed, objects_of(config, split, index, seed))


def make_scene(config: SceneConfig, split: str, index: int, seed: int = 0) -> Scene:
    """A scene with its picture as PNG.

    Args:
      config: of the picture.
      split: of :data:`SPLITS`; it decides on digits, backgrounds and pairs of colour and shape.
      index: of the picture in its split.
      seed: another one gives another data set. The held-out sets have seed 0.
    """
    objects = objects_of(config, split, index, seed)
    pixels = pixels_of(config, split, index, objects, seed)
    file = io.BytesIO()
    # Level 1: photographs hardly shrink further, and this is the slowest step.
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    scene = _annotated(config, split, index, seed, objects)
    return scene._replace(data=file.getvalue())


def _annotated(
    config: SceneConfig, split: str, index: int, seed: int, objects: tuple[Object, ...]
) -> Scene:
    instances = [_instance(mask) for mask in visible_masks(objects, config.side)]
    pairs = []
    for number, query in enumerate(queries_of(config, split, index, objects, seed)):
        key = index * PAIRS + number
        found = tuple(instances[i]._replace(id=key * PAIRS + i + 1) for i in query.answers(objects))
        pairs.append(Pair(query.text, str(key), found, True, True))
    picture = Picture(index, f"{split}_{index:05d}.png", (config.side, config.side))
    return Scene(picture, tuple(pairs))


def _instance(mask: np.ndarray) -> Instance:
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return Instance(mask_box(rle), rle, float(coco_mask.area(rle)))


def _chance(split: str, index: int, seed: int, stream: int) -> np.random.Generator:
    words = (seed, SPLITS.index(split), index, stream)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))
