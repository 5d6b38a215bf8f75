"""Many pictures, one after the other: overlays and one results file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from sam3_jax.data.images import ImageError, load_image
from sam3_jax.inference.files import overlay_names
from sam3_jax.inference.image import ImagePredictor
from sam3_jax.inference.postprocess import Detections, concatenate
from sam3_jax.inference.prompts import VISUAL, Prompt, PromptError
from sam3_jax.inference.results import CocoResults
from sam3_jax.inference.visualize import overlay


class Summary(NamedTuple):
    """What came of a run."""

    instances: int
    failed: int  # pictures
    results: Path


def segment_files(
    predictor: ImagePredictor,
    files: Sequence[Path],
    output: Path,
    *,
    phrases: Sequence[str],
    boxes: Sequence[Sequence[float]],
    box_labels: Sequence[int],
    threshold: float,
    info: dict[str, Any],
) -> Summary:
    """Writes ``output/NAME_overlay.png`` for every file and ``output/results.json`` for all.

    A picture that fails is reported on stderr and in the results, and the run goes on; an
    interrupted run leaves the results of the pictures that were done.

    Args:
      predictor: its image is replaced.
      files: pictures.
      output: an existing folder.
      phrases: each a prompt of its own; none searches by boxes alone.
      boxes: examples in pixels, used with every phrase and picture.
      box_labels: 1 or 0 for each box.
      threshold: on scores.
      info: further facts about the run for the results.

    Raises:
      OSError: when the results cannot be written.
    """
    signed = [[*box, "+" if label else "-"] for box, label in zip(boxes, box_labels, strict=True)]
    settings = {"threshold": threshold, "dtype": predictor.dtype.name, "boxes": signed}
    results = CocoResults(phrases or [VISUAL], {**info, **settings})
    prompts = [Prompt(phrase, boxes, box_labels) for phrase in phrases or [None]]
    instances = failed = 0
    bar = tqdm(files, unit="picture", dynamic_ncols=True, disable=None)  # only on a terminal
    try:
        for file, name in zip(bar, overlay_names(files), strict=True):
            bar.set_postfix_str(file.name)
            try:
                image = load_image(file)
                predictor.set_image(image)
                found = predictor.predict_many(prompts, threshold)
                _draw(image, found, phrases or [""], output / name)
            except (ImageError, PromptError, OSError) as error:
                failed += 1
                tqdm.write(f"failed: {file}: {error}", file=sys.stderr)
                results.add_error(file.as_posix(), str(error))
                continue
            categories = dict(zip(phrases or [VISUAL], found, strict=True))
            results.add_image(file.as_posix(), image.shape[:2], categories, name)
            instances += sum(len(part.scores) for part in found)
    finally:
        results.write(output / "results.json")
    return Summary(instances, failed, output / "results.json")


def _draw(
    image: UInt8[np.ndarray, "h w 3"],
    found: Sequence[Detections],
    labels: Sequence[str],
    path: Path,
) -> None:
    """Writes the picture with the instances of all phrases; one label for each phrase."""
    texts = [label for label, part in zip(labels, found, strict=True) for _ in part.scores]
    Image.fromarray(overlay(image, concatenate(found), texts)).save(path)
