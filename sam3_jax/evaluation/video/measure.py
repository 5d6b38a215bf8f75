"""All figures of tracks: one video after the other, with the rows behind them."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sam3_jax.evaluation import cgf1
from sam3_jax.evaluation.cgf1 import CgF1, PairScore
from sam3_jax.evaluation.video import hota, overlaps, teta, video_cgf1
from sam3_jax.evaluation.video.hota import Hota, HotaCounts
from sam3_jax.evaluation.video.records import (
    Id,
    Key,
    Track,
    Video,
    VideoDataset,
    VideoPredictions,
)
from sam3_jax.evaluation.video.teta import TetaCounts


class PairResult(NamedTuple):
    """One video-phrase pair in both measures of phrases."""

    score: PairScore
    hota: HotaCounts


class VideoEvaluation(NamedTuple):
    """Counts of all pairs, and of the classes of every video."""

    pairs: dict[Key, PairResult]
    classes: dict[Id, list[TetaCounts]]  # category id -> counts of each video
    threshold: float

    def cgf1(self) -> CgF1:
        """cgF1 of mask volumes with all its parts."""
        return cgf1.accumulate(result.score for result in self.pairs.values())

    def phota(self) -> Hota:
        """HOTA of phrases: every pair is a video of its own, and all counts are added."""
        return hota.figures([result.hota for result in self.pairs.values()])

    def class_hota(self) -> dict[str, float]:
        """HOTA of each category, and the mean over those annotated or predicted anywhere."""
        groups = collections.defaultdict(list)
        for (_, category), result in self.pairs.items():
            if result.score.targets or result.score.predicted:
                groups[category].append(result.hota)
        return _mean([hota.figures(group).summary() for group in groups.values()])

    def teta(self) -> dict[str, float]:
        """TETA's figures, the mean over categories with targets."""
        counted = [counts for counts in self.classes.values() if not teta.is_empty(counts)]
        return _mean([teta.figures(counts) for counts in counted])

    def metrics(self) -> dict[str, float]:
        """Flat names for a logger; fractions. ``pHOTA``, ``pDetA``... are those of phrases."""
        flat = self.cgf1().summary()
        flat |= {f"p{name}": value for name, value in self.phota().summary().items()}
        flat |= self.class_hota()
        flat |= {
            name if name == "TETA" else f"TETA_{name}": value for name, value in self.teta().items()
        }
        return flat


def measure_videos(
    dataset: VideoDataset,
    predictions: VideoPredictions,
    threshold: float = cgf1.SCORE_THRESHOLD,
) -> VideoEvaluation:
    """Computes everything; memory holds the overlaps of one video at a time.

    Args:
      dataset: of :func:`~sam3_jax.evaluation.video.annotations.load_video_annotations`.
      predictions: for its pairs.
      threshold: lowest score of a track that counts, inclusive.
    """
    shown = {key[1] for key, pair in dataset.pairs.items() if pair.targets}
    classes = [category for category in dataset.categories if category in shown]
    keys = collections.defaultdict(list)
    for key in dataset.pairs:
        keys[key[0]].append(key)
    pairs: dict[Key, PairResult] = {}
    counts: dict[Id, list[TetaCounts]] = {category: [] for category in classes}
    for video in dataset.videos.values():
        results, of_classes = _measure_video(
            video, keys[video.video_id], classes, dataset, predictions, threshold
        )
        pairs |= results
        for category, value in of_classes.items():
            counts[category].append(value)
    in_order = {key: pairs[key] for key in dataset.pairs}
    return VideoEvaluation(in_order, {c: v for c, v in counts.items() if v}, threshold)


def _measure_video(
    video: Video,
    keys: Sequence[Key],
    classes: Sequence[Id],
    dataset: VideoDataset,
    predictions: VideoPredictions,
    threshold: float,
) -> tuple[dict[Key, PairResult], dict[Id, TetaCounts]]:
    sides: tuple[list[tuple[Key, Track]], ...] = ([], [])
    for key in keys:
        sides[0].extend((key, track) for track in dataset.pairs[key].targets)
        tracks = predictions.found.get(key, ())
        sides[1].extend((key, track) for track in tracks if track.score >= threshold)
    for side in sides:
        side.sort(key=lambda item: item[1].number)
    whole = overlaps.overlaps(*([track for _, track in side] for side in sides))
    results = {}
    for key in keys:
        own = whole.part(*([i for i, (k, _) in enumerate(side) if k == key] for side in sides))
        results[key] = PairResult(video_cgf1.count(own), hota.count(own))
    number = {category: n for n, category in enumerate(dataset.categories)}
    labels = ([number[key[1]] for key, _ in side] for side in sides)
    by_number = teta.count(whole, *labels, [number[c] for c in classes])
    return results, {c: by_number[number[c]] for c in classes if number[c] in by_number}


def pair_rows(dataset: VideoDataset, evaluation: VideoEvaluation) -> list[dict[str, Any]]:
    """One row a pair, in the order of the ground truth."""
    rows = []
    for key, (score, counts) in evaluation.pairs.items():
        rows.append(
            {
                "video_id": key[0],
                "video": dataset.videos[key[0]].name,
                "phrase": dataset.pairs[key].phrase,
                **score.cells,
                **_hota_cells([counts]),
            }
        )
    return rows


def video_rows(dataset: VideoDataset, evaluation: VideoEvaluation) -> list[dict[str, Any]]:
    """One row a video, all phrases together."""
    groups = _groups(evaluation, 0)
    return [
        {"video_id": number, "video": dataset.videos[number].name, **_cells(group)}
        for number, group in groups.items()
    ]


def phrase_rows(dataset: VideoDataset, evaluation: VideoEvaluation) -> list[dict[str, Any]]:
    """One row a phrase, the most frequent first."""
    rows = []
    for category, group in _groups(evaluation, 1).items():
        counts = evaluation.classes.get(category)
        of_class = teta.figures(counts) if counts else {}
        parts = {f"TETA_{name}": of_class.get(name) for name in ("LocA", "AssocA", "ClsA")}
        phrase = dataset.categories[category]
        rows.append({"phrase": phrase, **_cells(group), "TETA": of_class.get("TETA"), **parts})
    return sorted(rows, key=lambda row: (-row["targets"], row["phrase"]))


def _groups(evaluation: VideoEvaluation, part: int) -> dict[Id, list[PairResult]]:
    groups = collections.defaultdict(list)
    for key, result in evaluation.pairs.items():
        groups[key[part]].append(result)
    return groups


def _cells(group: Sequence[PairResult]) -> dict[str, Any]:
    figures = cgf1.accumulate(result.score for result in group)
    positive = figures.il_tp + figures.il_fn
    return {
        "pairs": figures.pairs,
        "positive_pairs": positive,
        "targets": sum(result.score.targets for result in group),
        "predicted": sum(result.score.predicted for result in group),
        "pmF1": float(figures.pmf1.mean()) if positive else None,
        "IL_MCC": figures.il_mcc if 0 < positive < figures.pairs else None,
        "IL_TP": figures.il_tp,
        "IL_FP": figures.il_fp,
        "IL_TN": figures.il_tn,
        "IL_FN": figures.il_fn,
        **_hota_cells([result.hota for result in group]),
    }


def _hota_cells(counts: Sequence[HotaCounts]) -> dict[str, float | None]:
    """Empty where nothing is annotated and nothing predicted."""
    names = ("HOTA", "DetA", "AssA", "LocA")
    if not any((c.tp + c.fn + c.fp).any() for c in counts):
        return dict.fromkeys(names)
    summary = hota.figures(counts).summary()
    return {name: summary[name] for name in names}


def _mean(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each figure; nothing at all where there is none."""
    return {name: float(np.mean([f[name] for f in figures])) for name in (figures or [{}])[0]}
