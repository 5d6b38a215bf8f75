"""The pictures of ``python -m sam3_jax.demo``, what is asked about them, and what is right.

Scenes are drawn as the held-out sets are, from other photographs and digits than training's, but
from a seed of their own: they are in none of the sets. All but those of textures and counting were
chosen, of 24, because the shipped weights answer them; docs/demo says how often they do. The coins
are a real photograph, which nothing was trained on and nobody has annotated: there are 24 of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from sam3_jax.data.clicks import first_click
from sam3_jax.demo.layout import SceneConfig
from sam3_jax.demo.phrases import Query
from sam3_jax.demo.render import visible_masks
from sam3_jax.demo.scene import objects_of, pixels_of

SEED = 2026
SIDE = 512  # pixels: what is drawn is the same at any size
BOX, CLICK = "one box, no text", "one click"
COINS = 24
CLIP = 2  # that is left to try videos on, chosen like the scenes, of 7
CLIP_PHRASES = ("heart", "crescent")
COIN = (22.0, 33.0, 66.0, 76.0)  # around the first of them
Box = tuple[float, float, float, float]


class Question(NamedTuple):
    """One prompt (a phrase, an exemplar box or a click) and the right answer."""

    name: str  # of the file with the answer
    prompt: str  # as people read it
    count: int  # how many there are
    note: str  # what is special about it
    masks: Bool[np.ndarray, "n h w"] | None  # theirs; None: nobody has drawn them
    text: str | None = None
    box: Box | None = None  # (x0, y0, x1, y1), pixels
    point: tuple[float, float] | None = None  # (x, y), pixels


class Picture(NamedTuple):
    """A picture with the questions about it."""

    name: str  # of its file
    pixels: UInt8[np.ndarray, "h w 3"]
    questions: tuple[Question, ...]


def draw_pictures() -> list[Picture]:
    """All of them, in the order in which they are shown."""
    star = Query(color="blue", shape="star")
    return [
        _scene("ring", "test", 6, Query(color="yellow", shape="ring")),
        _scene("texture", "test", 19, Query(texture="striped", shape="circle")),
        _scene("digit", "test", 9, Query(shape="four"), note="handwritten"),
        _scene(
            "unseen",
            "unseen",
            23,
            Query(size="small", color="red", shape="crescent"),
            note="never together in training",
        ),
        _scene("count", "test", 11, Query(shape="cross"), shown="how many: cross"),
        _scene("absent", "test", 22, Query(color="green", shape="circle"), note="is not there"),
        _scene(
            "exemplar",
            "test",
            20,
            Query(color="pink", shape="cross"),
            kind="box",
            shown=BOX,
        ),
        _scene("click", "unseen", 3, star, kind="point", shown=CLICK),
        _coins(),
    ]


def _scene(
    name: str,
    split: str,
    index: int,
    query: Query,
    *,
    kind: str = "text",
    shown: str = "",
    note: str = "",
) -> Picture:
    """A scene and one question about what ``query`` means, by "text", "box" or "point"."""
    config = SceneConfig(side=SIDE)
    objects = objects_of(config, split, index, SEED)
    pixels = pixels_of(config, split, index, objects, SEED)
    masks = visible_masks(objects, SIDE)[list(query.answers(objects))]
    text, box, point = query.text if kind == "text" else None, None, None
    if kind != "text":
        largest = masks[masks.sum((1, 2)).argmax()]
        if kind == "box":
            box = _box_around(largest)
        else:
            masks = largest[None]
            point = tuple(first_click(largest, np.random.default_rng(0), center=True).tolist())
    question = Question(name, shown or query.text, len(masks), note, masks, text, box, point)
    return Picture(f"scene_{name}", pixels, (question,))


def _coins() -> Picture:
    import skimage.data  # an extra

    pixels = np.repeat(skimage.data.coins()[..., None], 3, axis=2)
    questions = (
        Question("coins_text", "circle", COINS, "a real photograph", None, text="circle"),
        Question("coins_exemplar", BOX, COINS, "a real photograph", None, box=COIN),
    )
    return Picture("coins", pixels, questions)


def _box_around(mask: Bool[np.ndarray, "h w"]) -> Box:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (
        float(columns[0]),
        float(rows[0]),
        float(columns[-1] + 1),
        float(rows[-1] + 1),
    )
