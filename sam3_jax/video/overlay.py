"""Frames with their objects drawn in: every object keeps its colour and its number."""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Bool, UInt8

from sam3_jax.inference import visualize
from sam3_jax.video.objects import Objects, check_objects

COLORS = 512  # then they repeat


@functools.lru_cache(maxsize=COLORS)
def _color(place: int) -> visualize.Color:
    return visualize.palette(place + 1)[place]


def color_of(object_id: int) -> visualize.Color:
    """The colour of an object, from its number alone; neighbouring numbers are far apart."""
    return _color(object_id % COLORS)


def draw_objects(
    image: UInt8[np.ndarray, "h w 3"],
    objects: Objects,
    *,
    show_ids: bool = True,
    show_phrases: bool = True,
    show_scores: bool = False,
) -> UInt8[np.ndarray, "h w 3"]:
    """Draws tinted masks, outlines and tags ("#3 red car 0.91") and returns a new picture.

    Tags are placed in the order of the ids, not of the scores, which change from frame to frame
    and would make them jump.

    Raises:
      ValueError: when the objects do not fit the frame.
    """
    height, width = image.shape[:2]
    check_objects(objects, (height, width))
    extents = [visualize.extent_of(mask) for mask in objects.masks]
    colors = [color_of(i) for i in objects.ids.tolist()]
    texts = []
    for i, phrase, score in zip(objects.ids, objects.phrases, objects.scores, strict=True):
        parts = f"#{i}" if show_ids else "", phrase if show_phrases else ""
        texts.append(" ".join(p for p in (*parts, f"{score:.2f}" if show_scores else "") if p))
    areas = np.asarray([np.count_nonzero(mask) for mask in objects.masks], np.int64)

    def crop_of(i: int) -> Bool[np.ndarray, "h w"]:
        x0, y0, x1, y1 = extents[i]
        return objects.masks[i, y0:y1, x0:x1]

    order = -objects.ids.astype(np.float64)
    return visualize.draw(image, crop_of, extents, areas, order, texts, colors)
