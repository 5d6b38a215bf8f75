"""cgF1 and mIoU against upstream's figures, brute force, and numbers worked out by hand."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sam3_jax.data.annotations import load_annotations
from sam3_jax.data.records import Instance
from sam3_jax.evaluation import cgf1, miou
from sam3_jax.evaluation.cgf1 import PairScore
from sam3_jax.evaluation.measure import measure
from sam3_jax.evaluation.predictions import load_predictions

# What upstream's sam3/eval/cgf1_eval.py (November 2025, pycocotools 2.0.11) gives for
# `random_case()`: CGF1Evaluator([a, b, c], iou_type=...).evaluate(predictions), run on its own.
UPSTREAM = {
    (1, "segm"): {
        "cgF1": 0.074652392,
        "precision": 0.127272438,
        "recall": 0.105660178,
        "F1": 0.115414167,
        "positive_macro_F1": 0.148926916,
        "positive_micro_F1": 0.123028062,
        "positive_micro_precision": 0.147368033,
        "IL_precision": 0.75999997,
        "IL_recall": 0.791666634,
        "IL_F1": 0.775509673,
        "IL_FPR": 0.181818176,
        "IL_MCC": 0.60679158,
        "cgF1@0.5": 0.20001123,
        "precision@0.5": 0.340908316,
        "recall@0.5": 0.283018334,
        "F1@0.5": 0.309228151,
        "positive_macro_F1@0.5": 0.392929086,
        "positive_micro_F1@0.5": 0.329620971,
        "positive_micro_precision@0.5": 0.394735803,
        "cgF1@0.75": 0.079986792,
        "precision@0.75": 0.136363326,
        "recall@0.75": 0.113207334,
        "F1@0.75": 0.123661535,
        "positive_macro_F1@0.75": 0.15787237,
        "positive_micro_F1@0.75": 0.131819219,
        "positive_micro_precision@0.75": 0.157894321,
    },
    (1, "bbox"): {
        "cgF1": 0.067987315,
        "precision": 0.115908827,
        "recall": 0.096226234,
        "F1": 0.105109859,
        "positive_macro_F1": 0.135244196,
        "positive_micro_F1": 0.112043933,
        "positive_micro_precision": 0.134210173,
        "IL_precision": 0.75999997,
        "IL_recall": 0.791666634,
        "IL_F1": 0.775509673,
        "IL_FPR": 0.181818176,
        "IL_MCC": 0.60679158,
        "cgF1@0.5": 0.186675181,
        "precision@0.5": 0.318181095,
        "recall@0.5": 0.264150445,
        "F1@0.5": 0.288609638,
        "positive_macro_F1@0.5": 0.375385811,
        "positive_micro_F1@0.5": 0.307642998,
        "positive_micro_precision@0.5": 0.368420083,
        "cgF1@0.75": 0.026642616,
        "precision@0.75": 0.045454442,
        "recall@0.75": 0.037735778,
        "F1@0.75": 0.041187518,
        "positive_macro_F1@0.75": 0.043853144,
        "positive_micro_F1@0.75": 0.04390736,
        "positive_micro_precision@0.75": 0.05263144,
    },
    (3, "segm"): {
        "cgF1": 0.11328225,
        "precision": 0.182926383,
        "recall": 0.170454158,
        "F1": 0.176420271,
        "positive_macro_F1": 0.237949981,
        "positive_micro_F1": 0.189823618,
        "positive_micro_precision": 0.214285102,
        "IL_precision": 0.739130403,
        "IL_recall": 0.809523771,
        "IL_F1": 0.772726739,
        "IL_FPR": 0.206896545,
        "IL_MCC": 0.596776368,
        "cgF1@0.5": 0.226593916,
        "precision@0.5": 0.365852766,
        "recall@0.5": 0.340908316,
        "F1@0.5": 0.352890415,
        "positive_macro_F1@0.5": 0.446155928,
        "positive_micro_F1@0.5": 0.379696529,
        "positive_micro_precision@0.5": 0.428570204,
        "cgF1@0.75": 0.135944573,
        "precision@0.75": 0.21951166,
        "recall@0.75": 0.20454499,
        "F1@0.75": 0.211714282,
        "positive_macro_F1@0.75": 0.278393094,
        "positive_micro_F1@0.75": 0.227798184,
        "positive_micro_precision@0.75": 0.257142122,
    },
    (3, "bbox"): {
        "cgF1": 0.102917244,
        "precision": 0.168292272,
        "recall": 0.153332993,
        "F1": 0.160419864,
        "positive_macro_F1": 0.213443183,
        "positive_micro_F1": 0.172455294,
        "positive_micro_precision": 0.197142294,
        "IL_precision": 0.739130403,
        "IL_recall": 0.809523771,
        "IL_F1": 0.772726739,
        "IL_FPR": 0.206896545,
        "IL_MCC": 0.596776368,
        "cgF1@0.5": 0.208841838,
        "precision@0.5": 0.341462582,
        "recall@0.5": 0.31111042,
        "F1@0.5": 0.325530754,
        "positive_macro_F1@0.5": 0.423747852,
        "positive_micro_F1@0.5": 0.349949913,
        "positive_micro_precision@0.5": 0.399998857,
        "cgF1@0.75": 0.074567499,
        "precision@0.75": 0.121950922,
        "recall@0.75": 0.111110864,
        "F1@0.75": 0.116228929,
        "positive_macro_F1@0.75": 0.148158954,
        "positive_micro_F1@0.75": 0.124950488,
        "positive_micro_precision@0.75": 0.142856735,
    },
}


class Chance:
    """Numbers that no version of numpy changes."""

    def __init__(self, seed: int):
        self.state = seed

    def below(self, n: int) -> int:
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self.state >> 33) % n


def encode(mask: np.ndarray) -> dict:
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def random_case() -> tuple[list[dict], list[dict]]:
    """SA-Co files of three annotators who do not always agree, and predictions near the truth."""
    chance, (height, width) = Chance(4), (40, 50)

    def ellipse() -> np.ndarray:
        y, x = np.mgrid[:height, :width]
        cy, cx = 5 + chance.below(height - 10), 5 + chance.below(width - 10)
        ry, rx = 3 + chance.below(6), 3 + chance.below(6)
        return ((y - cy) * rx) ** 2 + ((x - cx) * ry) ** 2 < (rx * ry) ** 2

    def moved(mask: np.ndarray) -> np.ndarray:
        return np.roll(mask, (chance.below(5) - 2, chance.below(5) - 2), (0, 1))

    def entry(mask: np.ndarray, image_id: int) -> dict:
        x, y, w, h = coco_mask.toBbox(coco_mask.encode(np.asfortranarray(mask, np.uint8))).tolist()
        # A tenth of a pixel off: no IoU lies on a threshold, where the last bit would decide.
        box = [(x + 0.1 * chance.below(5)) / width, y / height, w / width, h / height]
        return {"image_id": image_id, "category_id": 1, "segmentation": encode(mask), "bbox": box}

    files = [{"images": [], "annotations": [], "categories": [{"id": 1}]} for _ in range(3)]
    predictions = []
    for image_id in range(1000, 1060):
        there = [ellipse() for _ in range(chance.below(5) if chance.below(3) else 0)]
        for file in files:
            file["images"].append(
                {
                    "id": image_id,
                    "file_name": f"{image_id // 2}.jpg",
                    "text_input": f"thing {image_id % 7}",
                    "height": height,
                    "width": width,
                    "is_instance_exhaustive": int(chance.below(20) > 0),
                }
            )
            for mask in there:
                if chance.below(7):
                    more = {"id": len(file["annotations"]) + 1, "area": 0.01}
                    crowd = int(chance.below(16) == 0)
                    file["annotations"].append(
                        {**entry(moved(mask), image_id), **more, "iscrowd": crowd}
                    )
        near = [moved(mask) for mask in there if chance.below(9)]
        for mask in near + [ellipse() for _ in range(chance.below(2))]:
            score = (0.5, 0.3, 0.9, 0.7, 0.49999)[chance.below(5)]
            predictions.append({**entry(mask, image_id), "score": score})
    return files, predictions


def write(folder: Path, files: list[dict], predictions: list[dict]) -> tuple[list[Path], Path]:
    paths = [folder / f"{letter}.json" for letter in "abcdef"[: len(files)]]
    for path, data in zip(paths, files, strict=True):
        path.write_text(json.dumps(data))
    (folder / "predictions.json").write_text(json.dumps(predictions))
    return paths, folder / "predictions.json"


@pytest.mark.parametrize("annotators", [1, 3])
def test_all_figures_are_upstreams(tmp_path, annotators):
    files, predictions = random_case()
    paths, file = write(tmp_path, files[:annotators], predictions)
    dataset = load_annotations(paths)
    evaluation = measure(dataset, load_predictions(file, dataset))
    for kind in ("segm", "bbox"):
        figures = evaluation.cgf1[kind].summary()
        expected = UPSTREAM[annotators, kind]
        assert set(expected) == set(figures)
        for name, value in expected.items():
            # The constants have nine digits.
            assert figures[name] == pytest.approx(value, abs=1e-9), (kind, name)


def brute_force(ious: np.ndarray) -> list[int]:
    """True positives at each threshold, trying every assignment for the largest total."""
    if min(ious.shape) == 0:
        return [0] * 10
    ious = ious if ious.shape[0] <= ious.shape[1] else ious.T
    rows, best, chosen = range(len(ious)), -1.0, None
    for columns in itertools.permutations(range(ious.shape[1]), len(ious)):
        total = sum(ious[r, c] for r, c in zip(rows, columns, strict=True))
        if total > best:
            best, chosen = total, [ious[r, c] for r, c in zip(rows, columns, strict=True)]
    return [sum(iou >= t for iou in chosen) for t in cgf1.IOU_THRESHOLDS]


def test_one_assignment_by_total_iou(rng):
    for _ in range(150):
        ious = rng.uniform(size=rng.integers(0, 5, 2)) ** 0.5
        score = cgf1.score_pair(ious)
        assert score.true_positives.tolist() == brute_force(ious)
        assert (score.predicted, score.targets) == ious.shape


def test_the_total_decides_even_where_greedy_matching_finds_more():
    # Total 1.0 + 0.4 beats 0.68 + 0.68, although the latter has two hits at .50 and not one.
    score = cgf1.score_pair(np.asarray([[1.0, 0.68], [0.68, 0.4]]))
    assert score.true_positives[0] == 1


def hits(targets: int, predicted: int, *tp: int) -> PairScore:
    """True positives of the first thresholds; none at the others."""
    return PairScore(targets, predicted, np.asarray([*tp, *[0] * (10 - len(tp))]))


def test_figures_worked_out_by_hand():
    scores = [
        hits(2, 3, 2, 1),  # positive: at .50 2 right, 1 wrong
        hits(1, 0),  # missed altogether
        hits(0, 2),  # nothing there: its two count for precision, not for pmF1
        hits(0, 0),
        hits(0, 0),
    ]
    figures = cgf1.accumulate(scores)
    table = (figures.il_tp, figures.il_fp, figures.il_tn, figures.il_fn)
    assert table == (1, 1, 2, 1)
    # Tolerance: the guards of 1e-4 against division by zero.
    assert figures.positive_precision[0] == pytest.approx(2 / 3, abs=1e-4)
    assert figures.precision[0] == pytest.approx(2 / 5, abs=1e-4)
    assert figures.recall[0] == pytest.approx(2 / 3, abs=1e-4)
    assert figures.pmf1[:3] == pytest.approx([2 / 3, 1 / 3, 0], abs=1e-4)
    assert figures.positive_macro_f1[0] == pytest.approx(2 * (2 / 3) / (5 / 3), abs=2e-4)
    mcc = (1 * 2 - 1 * 1) / (2 * 2 * 3 * 3) ** 0.5
    assert figures.il_mcc == pytest.approx(mcc, abs=1e-6)
    assert figures.il_f1 == pytest.approx(0.5, abs=1e-5)
    assert figures.summary()["cgF1"] == pytest.approx(mcc * (2 / 3 + 1 / 3) / 10, abs=1e-4)


def test_nothing_to_average_is_nan_and_no_negatives_make_cgf1_zero():
    figures = cgf1.accumulate([hits(1, 0), hits(1, 1, *[1] * 10)])
    assert figures.il_mcc == 0
    assert figures.summary()["cgF1"] == 0
    assert np.isnan(cgf1.accumulate([hits(1, 0)]).positive_macro_f1).all()


def test_the_kindest_annotator_counts():
    good, poor, missed, right = hits(1, 1, 1, 1), hits(2, 1, 1), hits(2, 0), hits(0, 0)
    assert cgf1.best_answer([poor, good]) == 1
    assert cgf1.best_answer([good, poor, good]) == 0
    assert cgf1.best_answer([missed, right, missed]) == 1  # nothing predicted, nothing there
    assert cgf1.best_answer([right, missed]) == 0


def square(x: int, y: int, side: int, size: tuple[int, int] = (10, 10)) -> Instance:
    mask = np.zeros(size, np.uint8)
    mask[y : y + side, x : x + side] = 1
    return Instance((x, y, side, side), coco_mask.encode(np.asfortranarray(mask)), side**2)


def test_regions_are_unions():
    truth = [square(0, 0, 4), square(4, 0, 4)]  # 32 pixels
    found = [square(2, 0, 4), square(3, 0, 4)]  # 5 x 4 = 20 pixels within them
    assert miou.region_score(found, truth) == (20, 32, 32)
    assert miou.region_score([], truth) == (0, 32, 32)
    assert miou.region_score(found, []) == (0, 20, 0)
    assert np.isnan(miou.region_score([], []).iou)
