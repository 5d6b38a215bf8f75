"""HOTA, TETA and cgF1 of tracks: upstream's figures, plain definitions, and worked examples."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sam3_jax.evaluation.video import hota, teta, video_cgf1
from sam3_jax.evaluation.video.annotations import load_video_annotations
from sam3_jax.evaluation.video.measure import measure_videos
from sam3_jax.evaluation.video.overlaps import Overlaps, overlaps
from sam3_jax.evaluation.video.predictions import load_video_predictions
from sam3_jax.evaluation.video.records import Track
from video_cases import random_videos, strip, track, write

# What upstream gives for `random_videos()` (November 2025, pycocotools 2.0.11): the evaluators
# VideoCGF1, VideoPhraseHota, VideoClassBasedHota and VideoTeta (masks, exhaustive; its figures
# before they are rounded) of sam3/eval/saco_veval_evaluators.py, run on their own.
UPSTREAM = {
    "cgF1": 0.0984713471,
    "IL_MCC": 0.538290487,
    "positive_micro_F1": 0.182933471,
    "cgF1@0.5": 0.18322044,
    "cgF1@0.75": 0.0686910425,
    "pHOTA": 0.415551399,
    "HOTA": 0.348709892,
    "pDetA": 0.29858887,
    "DetA": 0.262342095,
    "pAssA": 0.581983557,
    "AssA": 0.472564533,
    "pDetRe": 0.404163394,
    "DetRe": 0.32562706,
    "pDetPr": 0.501461988,
    "DetPr": 0.504515575,
    "pAssRe": 0.620737581,
    "AssRe": 0.502083175,
    "pAssPr": 0.794626809,
    "AssPr": 0.634105758,
    "pLocA": 0.852494354,
    "LocA": 0.887857496,
    "pOWTA": 0.48424225,
    "OWTA": 0.3890216,
    "TETA": 0.550571473,
    "TETA_LocA": 0.520412348,
    "TETA_AssocA": 0.593426583,
    "TETA_ClsA": 0.53787549,
    "TETA_LocRe": 0.529170904,
    "TETA_LocPr": 0.871368179,
    "TETA_AssocRe": 0.631710849,
    "TETA_AssocPr": 0.796278273,
    "TETA_ClsRe": 0.767764074,
    "TETA_ClsPr": 0.595201126,
}


def test_all_figures_are_upstreams(tmp_path):
    gt, results = write(tmp_path, *random_videos())
    dataset = load_video_annotations(gt)
    predictions = load_video_predictions(results, dataset)
    assert not predictions.notes
    metrics = measure_videos(dataset, predictions).metrics()
    for name, value in UPSTREAM.items():
        # The constants have nine digits.
        assert metrics[name] == pytest.approx(value, abs=1e-9), name


def random_tracks(rng: np.random.Generator, count: int, near: np.ndarray | None = None):
    """Boolean masks (tracks, frames, 6, 8); some empty frames. ``near``: blurred copies of it."""
    if near is None:
        corner = rng.integers(0, 4, (count, 1, 2)) + rng.integers(0, 2, (count, 5, 2))
        y, x = np.mgrid[:6, :8]
        masks = (abs(y - corner[..., :1, None]) < 2) & (abs(x - corner[..., 1:, None]) < 3)
    else:
        masks = near[rng.integers(0, len(near), count)] ^ (rng.uniform(size=(count, 5, 6, 8)) < 0.1)
    return masks & (rng.uniform(size=(count, 5, 1, 1)) < 0.8)


def as_tracks(masks: np.ndarray) -> list[Track]:
    return [
        track(*(frame if frame.any() else None for frame in frames), number=n)
        for n, frames in enumerate(masks)
    ]


def plain_iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum() if (a | b).any() else 0.0


def visible(masks: np.ndarray, t: int) -> list[int]:
    return [i for i in range(len(masks)) if masks[i, t].any()]


def plain_assignments(truth: np.ndarray, found: np.ndarray) -> list[list[tuple[int, int, float]]]:
    """Of every frame the couples (annotated, predicted, IoU), trying all assignments."""
    frames = []
    for t in range(truth.shape[1]):
        pairs = itertools.product(visible(truth, t), visible(found, t))
        frames.append({(g, f): plain_iou(truth[g, t], found[f, t]) for g, f in pairs})
    alignment = {}
    for g, f in itertools.product(range(len(truth)), range(len(found))):
        common = 0.0
        for iou in frames:
            if iou.get((g, f), 0) > 0:
                row = sum(v for (a, _), v in iou.items() if a == g)
                column = sum(v for (_, b), v in iou.items() if b == f)
                common += iou[g, f] / (row + column - iou[g, f])
        either = truth[g].any((1, 2)).sum() + found[f].any((1, 2)).sum() - common
        alignment[g, f] = common / either if either else 0.0
    result = []
    for t, iou in enumerate(frames):
        rows, columns = visible(truth, t), visible(found, t)
        if len(rows) > len(columns):
            options = (list(zip(p, columns, strict=True)) for p in permutations(rows, columns))
        else:
            options = (list(zip(rows, p, strict=True)) for p in permutations(columns, rows))
        best = max(options, key=lambda pairs: sum(alignment[p] * iou[p] for p in pairs))
        result.append([(g, f, iou[g, f]) for g, f in best])
    return result


def permutations(longer: list[int], shorter: list[int]):
    return itertools.permutations(longer, len(shorter))


def plain_hota(truth: np.ndarray, found: np.ndarray, alpha: float) -> dict[str, float]:
    """The definitions of arXiv 2009.07736, section 4: a share of each true positive's track."""
    matches = [
        (t, g, f, iou)
        for t, pairs in enumerate(plain_assignments(truth, found))
        for g, f, iou in pairs
        if iou >= alpha
    ]
    truths = [(t, g) for t in range(truth.shape[1]) for g in visible(truth, t)]
    founds = [(t, f) for t in range(truth.shape[1]) for f in visible(found, t)]
    shares = []
    for _, g, f, _ in matches:
        tpa = sum(a == g and b == f for _, a, b, _ in matches)
        fna = sum(a == g for _, a in truths) - tpa
        fpa = sum(b == f for _, b in founds) - tpa
        shares.append(tpa / (tpa + fna + fpa))
    everything = len(truths) + len(founds) - len(matches)
    return {
        "HOTA": math.sqrt(sum(shares) / everything) if everything else 0,
        "DetA": len(matches) / everything if everything else 0,
        "AssA": np.mean(shares) if shares else 0,
        "LocA": np.mean([iou for *_, iou in matches]) if matches else 1,
    }


def test_hota_is_its_definition(rng):
    for _ in range(25):
        truth = random_tracks(rng, rng.integers(1, 4))
        found = random_tracks(rng, rng.integers(0, 4), truth)
        result = hota.figures([hota.count(overlaps(as_tracks(truth), as_tracks(found)))])
        for a in (0, 4, 9, 14, 18):
            expected = plain_hota(truth, found, round(float(hota.ALPHAS[a]), 2))
            values = (result.hota[a], result.det_a[a], result.ass_a[a], result.loc_a[a])
            # Sums of a few quotients in another order.
            assert values == pytest.approx(tuple(expected.values()), abs=1e-12)


A, B = strip(0, 6), strip(10, 6)


def hota_of(truth: list[Track], found: list[Track]) -> hota.Hota:
    return hota.figures([hota.count(overlaps(truth, found))])


def test_hota_of_worked_examples():
    # One object, followed by one track for two frames and by another one for two more: all is
    # found, and each frame shares half of its object.
    result = hota_of([track(A, A, A, A)], [track(A, A, None, None), track(None, None, A, A)])
    assert result.summary() == pytest.approx(
        {
            "HOTA": 0.5**0.5,
            "DetA": 1,
            "AssA": 0.5,
            "DetRe": 1,
            "DetPr": 1,
            "AssRe": 0.5,
            "AssPr": 1,
            "LocA": 1,
            "OWTA": 0.5**0.5,
        }
    )
    # Two objects whose tracks change places in the last frame of four: with 3 common frames of
    # 5 in 6 couples, and 1 of 7 in 2.
    switched = [track(A, A, A, B), track(B, B, B, A)]
    result = hota_of([track(A, A, A, A), track(B, B, B, B)], switched)
    assert result.det_a == pytest.approx(1)
    assert result.ass_a == pytest.approx((6 * 3 / 5 + 2 * 1 / 7) / 8)
    # A frame without prediction.
    result = hota_of([track(A, A, A, A)], [track(A, A, None, A)])
    assert (result.det_a[0], result.ass_a[0]) == pytest.approx((3 / 4, 3 / 4))
    # IoU 4/8 in both frames: right up to .5 and wrong above.
    result = hota_of([track(A, A)], [track(strip(2, 6), strip(2, 6))])
    np.testing.assert_allclose(result.hota, [1] * 10 + [0] * 9)
    np.testing.assert_allclose(result.loc_a, [0.5] * 10 + [1] * 9)


def test_hota_where_nothing_is():
    for truth, found in (([], []), ([track(A, A)], []), ([], [track(A, None)])):
        result = hota_of(truth, found).summary()
        assert {result[name] for name in ("HOTA", "DetA", "AssA")} == {0}
        assert result["LocA"] == 1
    counts = [hota.count(overlaps([track(A, A)], [track(A, A)]))]
    counts.append(hota.count(overlaps([], [track(A, A)])))  # a phrase that is not there
    assert hota.figures(counts).summary()["HOTA"] == pytest.approx(0.5**0.5)  # DetA is 2 of 4


def plain_teta(truth, truth_class, found, found_class, classes, alpha):
    """Counts of arXiv 2207.12978, section 4, for one threshold, by class: TPL, FNL, FPL, the sum
    of the shares of all TPL, TPC, FNC, FPC; with what the toolkit does besides."""
    frames = [t for t in range(truth.shape[1]) if visible(truth, t)]  # others do not exist

    def near(t: int, objects: list[int]) -> set[int]:
        return {
            f
            for f in visible(found, t)
            if any(plain_iou(truth[g, t], found[f, t]) >= 0.5 for g in objects)
        }

    def assignments(objects: list[int], tracks: list[int]):
        left = np.zeros_like(truth)
        left[objects] = truth[objects]
        right = np.zeros_like(found)
        right[tracks] = found[tracks]
        right[:, [t for t in range(truth.shape[1]) if t not in frames]] = False
        return plain_assignments(left, right)

    everybody = list(range(len(truth)))
    any_near = sorted(set().union(*(near(t, everybody) for t in frames)))
    first = assignments(everybody, any_near)
    result, wrong = {}, dict.fromkeys(classes, 0)
    for c in classes:
        own = [g for g in everybody if truth_class[g] == c]
        clusters = {}
        for t in frames:
            others = {f for g, f, iou in first[t] if iou >= 0.5 and truth_class[g] != c}
            clusters[t] = near(t, own) - others
        tracks = sorted(set().union(*clusters.values()))
        ghosts = sum(
            found_class[f] == c and f not in clusters[t] for t in frames for f in visible(found, t)
        )
        objects = sum(len([g for g in own if truth[g, t].any()]) for t in frames)
        wrong[c] = wrong[c] + ghosts if tracks else ghosts
        tpl = [
            (t, g, f)
            for t, pairs in enumerate(assignments(own, tracks))
            for g, f, iou in pairs
            if iou >= alpha
        ]
        shares = 0.0
        for _, g, f in tpl:
            tpa = sum((a, b) == (g, f) for _, a, b in tpl)
            frames_of = (truth[g, frames].any((1, 2)).sum(), found[f, frames].any((1, 2)).sum())
            shares += tpa / (sum(frames_of) - tpa)
        fpl = sum(
            len(clusters[t] - {f for s, _, f in tpl if s == t})
            for t in frames
            if any(truth[g, t].any() for g in own)
        )
        misnamed = [found_class[f] for _, _, f in tpl if found_class[f] != c]
        if alpha >= 0.5:
            for name in misnamed:
                if name in wrong:
                    wrong[name] += 1
        tpc = len(tpl) - len(misnamed)
        result[c] = [len(tpl), objects - len(tpl), fpl, shares, tpc, len(misnamed)]
    return {c: [*values, wrong[c]] for c, values in result.items()}


def test_teta_is_its_definition(rng):
    for _ in range(25):
        truth = random_tracks(rng, rng.integers(1, 4))
        found = random_tracks(rng, rng.integers(1, 5), truth)
        labels = rng.integers(0, 2, len(truth)).tolist(), rng.integers(0, 3, len(found)).tolist()
        video = overlaps(as_tracks(truth), as_tracks(found))
        counts = teta.count(video, *labels, [0, 1])  # 2 has no targets anywhere
        for a in (1, 6, 10, 13, 18):  # at 0 couples without overlap count, an arbitrary choice
            alpha = round(float(teta.ALPHAS[a]), 2)
            expected = plain_teta(truth, labels[0], found, labels[1], [0, 1], alpha)
            for c, values in expected.items():
                if c not in counts:
                    assert not any(values)
                    continue
                localised = [counts[c][i][a] for i in range(4)]
                assert localised == pytest.approx(values[:4], abs=1e-12)  # as for HOTA
                if alpha >= 0.5:
                    assert [counts[c][i][a - 10] for i in (6, 7, 8)] == values[4:]


def teta_of(truth, labels, found, names, classes=(0, 1)) -> dict[int, dict[str, float]]:
    counts = teta.count(overlaps(truth, found), labels, names, classes)
    return {c: teta.figures([value]) for c, value in counts.items()}


def test_teta_of_worked_examples():
    # Followed without fault under a wrong name.
    result = teta_of([track(A, A)], [0], [track(A, A)], [1])
    parts = [result[0][name] for name in ("TETA", "LocA", "AssocA", "ClsA")]
    assert parts == pytest.approx([2 / 3, 1, 1, 0])
    # A track in the empty part of the picture is no fault of localisation, but of its name.
    result = teta_of([track(A, A)], [0], [track(A, A), track(B, B)], [0, 0])
    parts = [result[0][name] for name in ("LocA", "AssocA", "ClsA")]
    assert parts == pytest.approx([1, 1, 0.5])
    # Two tracks on one object: one of them is wrong in localisation.
    result = teta_of([track(A, A)], [0], [track(A, A), track(strip(0, 5), strip(0, 5))], [0, 0])
    assert (result[0]["LocA"], result[0]["LocRe"]) == pytest.approx((0.5, 1))
    # An identity that is lost half-way.
    result = teta_of([track(A, A)], [0], [track(A, None), track(None, A)], [0, 0])
    assert (result[0]["AssocA"], result[0]["AssocRe"], result[0]["AssocPr"]) == (0.5, 0.5, 1)


def test_teta_where_nothing_is():
    assert teta_of([], [], [], []) == {}
    missed = teta_of([track(A, A)], [0], [], [])
    assert set(missed[0].values()) == {0}
    counts = teta.count(overlaps([], [track(A, A)]), [], [0], (0, 1))
    assert teta.is_empty([counts[0]])  # frames without annotations do not count
    assert not counts[0].cls_fp.any()


def test_what_a_toolkits_class_forgets():
    # Object of class 0 named 1: one false positive of class 1 in each frame for the wrong name,
    # and one for a prediction of class 1 where none is. If class 1 has nothing near, the latter
    # replaces those that were counted before it: the order of the classes decides.
    truth, found = [track(A, A)], [track(A, A)]
    first = teta.count(overlaps(truth, found), [0], [1], (0, 1))[1].cls_fp
    second = teta.count(overlaps(truth, found), [0], [1], (1, 0))[1].cls_fp
    assert (first[0], second[0]) == (2, 4)


def test_volumes_are_compared_over_all_frames(rng):
    for _ in range(25):
        truth = random_tracks(rng, 3)
        found = random_tracks(rng, 4, truth)
        expected = [[plain_iou(f, g) for g in truth] for f in found]
        video = overlaps(as_tracks(truth), as_tracks(found))
        np.testing.assert_array_equal(video.volume_iou(), expected)  # quotients of equal integers
        part = video.part([2, 0], [1, 3])
        np.testing.assert_array_equal(part.volume_iou(), np.asarray(expected)[[1, 3]][:, [2, 0]])


def test_volumes_of_worked_examples():
    half = video_cgf1.count(overlaps([track(A, A, A, A)], [track(A, A, None, None)]))
    assert half.true_positives.tolist() == [1] + [0] * 9
    # Changed places in one frame of four: 3 common of 5.
    truth = [track(A, A, A, A), track(B, B, B, B)]
    score = video_cgf1.count(overlaps(truth, [track(A, A, A, B), track(B, B, B, A)]))
    assert score.true_positives.tolist() == [2, 2, 2] + [0] * 7
    # One fragment has 3 frames of 4, the other one is wrong at every threshold.
    score = video_cgf1.count(
        overlaps(truth[:1], [track(A, A, A, None), track(None, None, None, A)])
    )
    assert score.true_positives.tolist() == [1] * 6 + [0] * 4
    assert (score.targets, score.predicted) == (1, 2)
    # A track without a pixel is a prediction, and a wrong one; a video may have no frames at all.
    score = video_cgf1.count(overlaps([], [track(None, None)]))
    assert (score.targets, score.predicted, score.true_positives.sum()) == (0, 1, 0)
    assert video_cgf1.count(overlaps([], [])).empty


def test_cgf1_of_videos_is_its_definition(tmp_path):
    data, results = random_videos(3)
    gt, file = write(tmp_path, data, results)
    dataset = load_video_annotations(gt)
    evaluation = measure_videos(dataset, load_video_predictions(file, dataset))
    sure = [entry for entry in results if entry["score"] >= 0.5]
    there, said, tp, fp, fn = [], [], 0, 0, 0
    for pair in data["video_np_pairs"]:
        key = (pair["video_id"], pair["category_id"])
        truth, found = (
            [volume(e) for e in part if (e["video_id"], e["category_id"]) == key]
            for part in (data["annotations"], sure)
        )
        there.append(bool(truth))
        said.append(bool(found))
        if truth:
            hits = best_hits([[plain_iou(f, g) for g in truth] for f in found], 0.5)
            tp, fp, fn = tp + hits, fp + len(found) - hits, fn + len(truth) - hits
    metrics = evaluation.metrics()
    mcc = np.corrcoef(there, said)[0, 1]  # Matthews' is Pearson's of yes and no
    # Tolerances: the guards against division by zero, 1e-6 and 1e-4 of counts of ten.
    assert metrics["IL_MCC"] == pytest.approx(mcc, abs=1e-6)
    f1 = 2 * tp / (2 * tp + fp + fn)
    assert tp > 3
    assert metrics["positive_micro_F1@0.5"] == pytest.approx(f1, abs=1e-4)
    assert metrics["cgF1@0.5"] == pytest.approx(f1 * mcc, abs=1e-4)


def volume(entry: dict) -> np.ndarray:
    masks = entry["segmentations"]
    size = next((m["size"] for m in masks if m), (40, 50))
    return np.stack([coco_mask.decode(m) if m else np.zeros(size, np.uint8) for m in masks]) > 0


def best_hits(ious: list[list[float]], threshold: float) -> int:
    """Couples at the threshold in the assignment of largest total IoU, all of them tried."""
    ious = np.asarray(ious)
    if not ious.size:
        return 0
    ious = ious if ious.shape[0] <= ious.shape[1] else ious.T
    options = itertools.permutations(range(ious.shape[1]), len(ious))
    best = max(options, key=lambda columns: ious[range(len(ious)), columns].sum())
    return int((ious[range(len(ious)), best] >= threshold).sum())


def test_frames_keep_only_what_is_visible():
    video = overlaps([track(A, None), track(B, B)], [track(None, None), track(A, B)])
    assert isinstance(video, Overlaps)
    assert [frame.truth.tolist() for frame in video.frames] == [[0, 1], [1]]
    assert [frame.found.tolist() for frame in video.frames] == [[1], [1]]
    assert [frame.iou.tolist() for frame in video.frames] == [[[1.0], [0.0]], [[1.0]]]
