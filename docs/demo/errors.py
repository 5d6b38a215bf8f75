"""What a model's wrong answers are: ``python docs/demo/errors.py CHECKPOINT DATA``.

Of phrases that name something in the first held-out pictures: how often an answer is a new object
(an IoU of .5 or more), one that was found already, a part of one, or something else; and the best
IoU that each object reaches, by size.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from pycocotools import mask as coco_mask
from scipy.optimize import linear_sum_assignment

from sam3_jax.data.pictures import load_as_annotated
from sam3_jax.data.records import Instance
from sam3_jax.demo.asking import GROUP, by_picture
from sam3_jax.demo.figures import SETS, read_set
from sam3_jax.inference.image import ImagePredictor
from sam3_jax.inference.postprocess import Detections
from sam3_jax.inference.prompts import Prompt
from sam3_jax.inference.rle import encode_mask

RIGHT, PART = 0.5, 0.15  # IoU
SHOWN = 0.1  # least score of what counts for the best IoU


def ious(answer: Detections, truth: Sequence[Instance]) -> Float[np.ndarray, "n m"]:
    """Intersection over union of every answer with every object."""
    found, right = [encode_mask(mask) for mask in answer.masks], [i.rle for i in truth]
    overlap = coco_mask.iou(found, right, [0] * len(right))  # a list where there is no answer
    return np.reshape(overlap, (len(found), len(right)))


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="folder of a run's model")
    parser.add_argument("data", type=Path, help="folder of the held-out sets")
    parser.add_argument("--split", choices=SETS, default=SETS[0])
    parser.add_argument("--pictures", type=int, default=16, help="(default 16)")
    args = parser.parse_args()
    predictor = ImagePredictor.from_pretrained(args.checkpoint)
    kinds: collections.Counter[str] = collections.Counter()
    sizes, best = [], []
    dataset = read_set(args.data, args.split, args.pictures)
    for name, records in by_picture(dataset).items():
        predictor.set_image(load_as_annotated(args.data / args.split / name, records[0].size))
        records = [r for r in records if r.answers[0].instances]
        prompts = [Prompt(r.phrase) for r in records]
        prompts += prompts[-1:] * (-len(prompts) % GROUP)  # always as many: one program
        for start in range(0, len(prompts), GROUP):
            answers = predictor.predict_many(prompts[start : start + GROUP], SHOWN)
            for record, answer in zip(records[start : start + GROUP], answers, strict=False):
                truth = record.answers[0].instances
                sizes += [instance.area for instance in truth]
                overlap = ious(answer, truth)
                best += overlap.max(0, initial=0.0).tolist()
                overlap = overlap[answer.scores >= 0.5]
                rows, columns = linear_sum_assignment(-overlap)
                new = set(rows[overlap[rows, columns] >= RIGHT])
                kinds["new object"] += len(new)
                for row in set(range(len(overlap))) - new:
                    most = overlap[row].max()
                    kind = "found already" if most >= RIGHT else "a part"
                    kinds[kind if most >= PART else "something else"] += 1
    print(", ".join(f"{kind}: {count}" for kind, count in kinds.most_common()))
    edges = np.quantile(sizes, [0, 1 / 3, 2 / 3, 1])
    for low, high in zip(edges, edges[1:], strict=False):
        part = np.array([b for s, b in zip(sizes, best, strict=True) if low <= s <= high])
        print(
            f"{low:.0f} to {high:.0f} pixels: best IoU {np.median(part):.2f} (median), "
            f"{100 * (part >= RIGHT).mean():.0f}% at {RIGHT} or more"
        )


if __name__ == "__main__":
    main()
