"""What a training step takes, and how it is cut into micro-batches."""

from __future__ import annotations

from typing import NamedTuple

import jax
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, UInt8

from sam3_jax.training.targets import Targets
from sam3_jax.types import Geometry


class Clicks(NamedTuple):
    """First prompts of single objects, C an image: a point, or a box as two points.

    Points and labels are those of ``ClickPrompt``; ``masks`` are the objects' at the size of the
    comparison, ``valid``: not padding.
    """

    points: Float[Array, "*b c 2 2"]
    labels: Int[Array, "*b c 2"]
    masks: Bool[Array, "*b c m m"]
    valid: Bool[Array, "*b c"]


class TrainBatch(NamedTuple):
    """B images with K prompts each, image by image: prompt p is about image p // K.

    ``images`` are 8-bit RGB. ``tokens``, ``geometry`` and ``targets`` have a row for each of the
    B * K prompts, ``clicks`` one for each image.
    """

    images: UInt8[Array, "b h w 3"]
    tokens: Int[Array, "p n"]
    geometry: Geometry
    targets: Targets
    clicks: Clicks


def normalize(images: UInt8[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """8-bit values to the model's [-1, 1]."""
    return images.astype("float32") / 127.5 - 1.0


def prompts_per_image(batch: TrainBatch) -> int:
    """K.

    Raises:
      ValueError: where the images do not have the same number of prompts.
    """
    images, prompts = len(batch.images), len(batch.tokens)
    if prompts % images:
        raise ValueError(
            f"a batch of {images} images has {prompts} prompts: give each image the same number, "
            "fillers included"
        )
    return prompts // images


def micro_batches(batch: TrainBatch, count: int) -> TrainBatch:
    """The batch with a new leading axis of ``count``; every ``count``-th image goes into one.

    So each device cuts its own images, and none moves between devices.

    Raises:
      ValueError: where ``count`` does not divide the number of images.
    """
    if len(batch.images) % count:
        raise ValueError(f"{len(batch.images)} images cannot be cut into {count} micro-batches")
    per_image = prompts_per_image(batch)

    def cut(x: Array, rows: int) -> Array:
        return rearrange(x, "(b m r) ... -> m (b r) ...", m=count, r=rows)

    images, clicks = jax.tree.map(lambda x: cut(x, 1), (batch.images, batch.clicks))
    prompts = jax.tree.map(lambda x: cut(x, per_image), batch._replace(images=(), clicks=()))
    return prompts._replace(images=images, clicks=clicks)
