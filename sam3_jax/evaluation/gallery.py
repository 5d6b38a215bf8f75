"""A contact sheet of pairs, annotated on the left and predicted on the right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont

from sam3_jax.data.annotations import image_path
from sam3_jax.data.images import ImageError
from sam3_jax.data.masks import decode
from sam3_jax.data.pictures import load_as_annotated
from sam3_jax.data.records import Dataset, Instance, Key, Record
from sam3_jax.evaluation.cgf1 import score_record
from sam3_jax.evaluation.measure import Evaluation
from sam3_jax.evaluation.predictions import Predictions
from sam3_jax.inference.postprocess import Detections
from sam3_jax.inference.visualize import overlay

SIDE = 480  # longer side of a picture on the sheet
GAP = 8
LINE = 22
INK, PAPER = (235, 235, 235), (24, 24, 24)


def draw_gallery(
    keys: Sequence[Key],
    dataset: Dataset,
    predictions: Predictions,
    evaluation: Evaluation,
    images: Path,
    path: Path,
) -> list[str]:
    """Writes ``path``, a PNG with one row a pair; nothing when no picture can be read.

    Returns:
      what went wrong with pictures, a line each.
    """
    records = {record.key: record for record in dataset.records}
    rows, failures = [], []
    for key in keys:
        try:
            row = draw_pair(records[key], predictions.found.get(key, []), evaluation, images)
        except ImageError as error:
            failures.append(str(error))
            continue
        rows.append(Image.fromarray(row))
    if rows:
        _stack(rows).save(path)
    return failures


def draw_pair(
    record: Record, found: Sequence[Instance], evaluation: Evaluation, images: Path
) -> UInt8[np.ndarray, "h w 3"]:
    """One pair: phrase and counts above, annotated on the left and predicted on the right.

    Raises:
      ImageError: when the picture cannot be read.
    """
    file = image_path(images, record.file_name)
    if file is None:
        raise ImageError(f"{images / record.file_name}: no such file")
    pixels = load_as_annotated(file, record.size)
    return np.asarray(_row(record, pixels, found, evaluation))


def _row(
    record: Record,
    pixels: UInt8[np.ndarray, "h w 3"],
    found: Sequence[Instance],
    evaluation: Evaluation,
) -> Image.Image:
    sure = [i for i in found if i.score >= evaluation.threshold]
    best, score = score_record(record, found, evaluation.kind, evaluation.threshold)
    scale = min(SIDE / max(record.size), 1.0)
    size = (max(round(record.size[1] * scale), 1), max(round(record.size[0] * scale), 1))
    small = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
    truth = overlay(
        small, _detections(record.answers[best].instances, record.size, size), show_scores=False
    )
    guess = overlay(small, _detections(sure, record.size, size))
    hits = int(score.true_positives[0])
    title = (
        f"{record.phrase}  |  {record.file_name}  |  annotated {score.targets}, predicted "
        f"{score.predicted}, right {hits} (IoU .50)  |  F1 {score.local_f1.mean():.2f}"
    )
    row = Image.new("RGB", (2 * SIDE + GAP, LINE + size[1]), PAPER)
    row.paste(Image.fromarray(truth), (0, LINE))
    row.paste(Image.fromarray(guess), (SIDE + GAP, LINE))
    ImageDraw.Draw(row).text((2, 3), title, INK, ImageFont.load_default(13))
    return row


def _detections(
    instances: Sequence[Instance], size: tuple[int, int], small: tuple[int, int]
) -> Detections:
    """Instances shrunk to ``small`` (width, height), rectangles for those without masks."""
    masks = np.zeros((len(instances), small[1], small[0]), bool)
    for mask, instance in zip(masks, instances, strict=True):
        full = decode([instance.rle], size)[0] if instance.rle else _rectangle(instance, size)
        shrunk = Image.fromarray(full.astype(np.uint8) * 255).resize(small, Image.Resampling.BOX)
        mask[:] = np.asarray(shrunk) >= 64  # thin things stay visible
    boxes = np.asarray([i.box for i in instances], np.float32).reshape(-1, 4)
    scores = np.asarray([i.score for i in instances], np.float32)
    return Detections(masks, boxes, scores)


def _rectangle(instance: Instance, size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    x, y, width, height = instance.box
    mask = np.zeros(size, bool)
    mask[max(round(y), 0) : round(y + height), max(round(x), 0) : round(x + width)] = True
    return mask


def _stack(rows: Sequence[Image.Image]) -> Image.Image:
    heading = Image.new("RGB", (rows[0].width, LINE), PAPER)
    draw, font = ImageDraw.Draw(heading), ImageFont.load_default(14)
    draw.text((2, 3), "ANNOTATED", INK, font)
    draw.text((SIDE + GAP, 3), "PREDICTED", INK, font)
    parts = [heading, *rows]
    sheet = Image.new("RGB", (heading.width, sum(p.height + GAP for p in parts)), PAPER)
    y = 0
    for part in parts:
        sheet.paste(part, (0, y))
        y += part.height + GAP
    return sheet
