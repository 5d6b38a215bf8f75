"""Several images in memory at once: the body of ``ImagePredictor.predict_batch``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sam3_jax.data.images import ImageSource, load_image, resize_image
from sam3_jax.inference.engine import Engine
from sam3_jax.inference.options import Options
from sam3_jax.inference.postprocess import Detections, detections
from sam3_jax.inference.prompts import Prompt, PromptError


def predict_batch(
    engine: Engine,
    images: Sequence[ImageSource],
    prompts: Sequence[Prompt] | Sequence[Sequence[Prompt]],
    threshold: float,
    options: Options,
    batch_size: int,
) -> list[list[Detections]]:
    """See :meth:`sam3_jax.ImagePredictor.predict_batch`."""
    if prompts and not isinstance(prompts[0], Prompt):
        asked = [list(own) for own in prompts]
    else:
        asked = [list(prompts)] * len(images)
    if len(asked) != len(images):
        raise PromptError(f"{len(asked)} lists of prompts for {len(images)} images")
    tight, side = engine.boxes_from_masks(options), engine.config.image_size
    results: list[list[Detections]] = []
    for start in range(0, len(images), batch_size):
        pixels = [load_image(image) for image in images[start : start + batch_size]]
        sizes = [image.shape[:2] for image in pixels]
        inputs = np.stack([resize_image(image, (side, side)) for image in pixels])
        own = asked[start : start + batch_size]
        rounds = engine.submit(inputs, own, sizes, batch_size)
        thresholds = [[threshold] * len(one) for one in own]
        for size, kept in zip(sizes, engine.collect(rounds, thresholds, options), strict=True):
            results.append([detections(*k[:3], size, boxes_from_masks=tight) for k in kept])
    return results
