"""What is asked on the demo's held-out sets, by fixed rules, and a predictor's answers.

- Text: every pair of the annotation file.
- Exemplar: the pairs whose phrase is exactly a colour and a shape. Those with targets are asked by
  one box instead of the phrase, that of the target with the most visible pixels (the first of
  equals), without noise. Those without have no box to show and keep their text.
- Clicks: objects in the order of the file, the first one of each picture before the second of any.
  The first click is the object's innermost point, furthest from its edge. Every further one is the
  innermost point of what is wrong, of the missed or of the extra part, whichever is deeper; the
  mask so far is shown to the model again.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from pycocotools import mask as coco_mask
from tqdm import tqdm

from sam3_jax.data.clicks import correction_click, first_click
from sam3_jax.data.masks import mask_box
from sam3_jax.data.pictures import load_as_annotated
from sam3_jax.data.records import Dataset, Instance, Key, Record
from sam3_jax.demo.objects import COLORS, SHAPES
from sam3_jax.demo.weights import DISTINCT
from sam3_jax.inference.image import ImagePredictor
from sam3_jax.inference.nms import nms
from sam3_jax.inference.prompts import Prompt
from sam3_jax.inference.rle import encode_mask

COLOR_SHAPE = re.compile(f"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})")
CLICKS = 3
GROUP = 4  # prompts that are grounded together: always as many, so that it is one program
MIN_SCORE = 0.49  # figures count from .5 on


class Answers(NamedTuple):
    """A predictor's answers on one set."""

    text: dict[Key, list[Instance]]
    exemplar: dict[Key, list[Instance]]  # only of pairs that were asked by a box
    clicks: list[list[float]]  # IoU of each object's mask after each click


def ask(
    predictor: ImagePredictor, dataset: Dataset, images: Path, *, exemplars: bool, objects: int
) -> Answers:
    """Asks everything about one picture after the other.

    Args:
      predictor: its image is replaced.
      dataset: whose pairs are asked.
      images: folder of the pictures.
      exemplars: ask by boxes too.
      objects: how many are clicked on.

    Raises:
      ImageError, OSError: on a picture that cannot be read.
    """
    answers = Answers({}, {}, [])
    targets = click_targets(dataset, objects)
    for name, records in tqdm(by_picture(dataset).items(), unit=" pictures", disable=None):
        predictor.set_image(load_as_annotated(images / name, records[0].size))
        answers.text.update(_find(predictor, {r.key: Prompt(r.phrase) for r in records}))
        if exemplars:
            answers.exemplar.update(_find(predictor, exemplar_prompts(records)))
        for instance in targets.get(name, ()):
            mask = coco_mask.decode(instance.rle).astype(bool)
            answers.clicks.append(click_ious(predictor, mask))
    return answers


def by_picture(dataset: Dataset) -> dict[str, list[Record]]:
    """The pairs of each picture, in the order of the file."""
    pictures: dict[str, list[Record]] = {}
    for record in dataset.records:
        pictures.setdefault(record.file_name, []).append(record)
    return pictures


def exemplar_pairs(records: Sequence[Record]) -> list[Record]:
    """The pairs that one box could ask, and those without targets that are like them."""
    return [record for record in records if COLOR_SHAPE.fullmatch(record.phrase)]


def exemplar_prompts(records: Sequence[Record]) -> dict[Key, Prompt]:
    """A box instead of the phrase, for each pair that has one to show."""
    prompts = {}
    for record in exemplar_pairs(records):
        targets = record.answers[0].instances
        if targets:
            x, y, width, height = max(targets, key=lambda instance: instance.area).box
            prompts[record.key] = Prompt(boxes=[(x, y, x + width, y + height)])
    return prompts


def distinct(found: Mapping[Key, list[Instance]]) -> dict[Key, list[Instance]]:
    """The answers without duplicates: as ``infer.py --nms iou`` gives them."""
    kept = {}
    for key, instances in found.items():
        kept[key] = instances
        if len(instances) > 1:
            masks = np.stack([coco_mask.decode(i.rle).astype(bool) for i in instances])
            scores = np.array([i.score for i in instances])
            rest = nms(masks, scores, measure=DISTINCT.nms, threshold=DISTINCT.nms_threshold)
            kept[key] = [instances[i] for i in rest]
    return kept


def click_targets(dataset: Dataset, count: int) -> dict[str, list[Instance]]:
    """Up to ``count`` objects by picture: the first of every picture, then the second, ..."""
    own: dict[str, list[Instance]] = {}
    for name, records in by_picture(dataset).items():
        # An object answers several phrases: its mask says that it is the same.
        different = {i.rle["counts"]: i for r in records for i in r.answers[0].instances}
        own[name] = list(different.values())
    rounds = itertools.zip_longest(*own.values())
    order = [(n, i) for turn in rounds for n, i in zip(own, turn, strict=True) if i]
    chosen: dict[str, list[Instance]] = {}
    for name, instance in order[:count]:
        chosen.setdefault(name, []).append(instance)
    return chosen


def click_ious(
    predictor: ImagePredictor, mask: Bool[np.ndarray, "h w"], clicks: int = CLICKS
) -> list[float]:
    """A user's session on the predictor's image: IoU with the object ``mask`` after every click.

    A single click gives three hypotheses, of which the user takes the model's favourite.
    """
    rng = np.random.default_rng(0)  # for points that are drawn: these are all innermost ones
    points, labels, ious = [], [], []
    shown, predicted = None, np.zeros_like(mask)
    for number in range(clicks):
        if number:
            point, label = correction_click(predicted, mask, rng, center=True)
        else:
            point, label = first_click(mask, rng, center=True), 1
        points.append(point)
        labels.append(label)
        found = predictor.predict_points(points, labels, mask_input=shown, multimask=not number)
        best = int(found.iou.argmax())
        predicted, shown = found.masks[best], found.low_res_logits[best]
        ious.append(float((predicted & mask).sum() / (predicted | mask).sum()))
    return ious


def _find(predictor: ImagePredictor, prompts: Mapping[Key, Prompt]) -> dict[Key, list[Instance]]:
    """Instances of each prompt on the predictor's image."""
    found = {}
    keys = list(prompts)
    for start in range(0, len(keys), GROUP):
        group = keys[start : start + GROUP]
        asked = [prompts[key] for key in group]
        filled = asked + asked[:1] * (GROUP - len(asked))
        for key, (masks, _, scores) in zip(
            group, predictor.predict_many(filled, MIN_SCORE), strict=False
        ):
            found[key] = [_instance(*one) for one in zip(masks, scores.tolist(), strict=True)]
    return found


def _instance(mask: Bool[np.ndarray, "h w"], score: float) -> Instance:
    rle = encode_mask(mask)
    return Instance(mask_box(rle), rle, float(mask.sum()), score=score)
