"""Whole frames of concept tracking: against transformers' planning, and worked by hand."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from oracle.concepts import Decisions, Planner, capped_masks
from sam3_jax.tracking.concepts import masklets
from sam3_jax.tracking.concepts.config import ConceptConfig
from sam3_jax.tracking.concepts.masklets import Masklets
from sam3_jax.tracking.concepts.plan import Detected, FramePlan, Measures, measure, plan_frame
from sam3_jax.tracking.concepts.shrinkage import encoder_masks, memory_masks

SIDE, DETECTIONS, ROWS = 24, 12, 16
QUICK = {  # so that within a few dozen frames everything happens
    "hotstart": 7,
    "hotstart_unmatched": 3,
    "hotstart_duplicate": 3,
    "keep_alive_start": 2,
    "keep_alive_max": 4,
    "hide_unmatched": True,
    "recondition_every": 3,
    "recondition_overlap": 0.6,
    "occlusion_iou": 0.5,
}


def blob(box: np.ndarray) -> np.ndarray:
    """Logits of a rectangle (y, x, height, width)."""
    y, x, height, width = box.astype(int)
    mask = np.full((SIDE, SIDE), -5.0, np.float32)
    mask[max(y, 0) : y + height, max(x, 0) : x + width] = 3.0
    return mask


class World:
    """A phrase's detector and tracker, made up: rectangles that wander, vanish and meet."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.things = self.rng.integers(2, 14, (4, 4)).astype(float)
        self.tracks: dict[int, np.ndarray] = {}

    def detect(self) -> tuple[np.ndarray, np.ndarray]:
        """Masks and scores above the threshold, some of things and some of nothing."""
        rng = self.rng
        self.things[:, :2] += rng.normal(0, 0.7, (4, 2))
        seen = self.things[rng.random(4) < 0.75]
        ghosts = rng.integers(2, 14, (rng.poisson(0.7), 4))
        boxes = np.concatenate([seen + rng.integers(-1, 2, seen.shape), ghosts])
        boxes = boxes[: DETECTIONS // 2]
        masks = np.zeros((0, SIDE, SIDE), np.float32)
        if len(boxes):
            masks = np.stack([blob(np.maximum(box, 1)) for box in boxes])
        return masks, rng.uniform(0.5, 1, len(boxes)).astype(np.float32)

    def propagate(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Masks and object logits of the tracked."""
        rng = self.rng
        masks = np.zeros((len(ids), SIDE, SIDE), np.float32)
        for mask, i in zip(masks, ids, strict=True):
            if i not in self.tracks:
                self.tracks[i] = self.things[rng.integers(4)].copy()
            self.tracks[i][:2] += rng.normal(0, 0.5, 2)
            near = self.things[np.abs(self.things - self.tracks[i]).sum(1).argmin()]
            self.tracks[i] += 0.5 * (near - self.tracks[i]) * (rng.random() < 0.6)
            mask[:] = blob(self.tracks[i]) if rng.random() < 0.85 else -5.0
        return masks, rng.normal(2, 2, len(ids)).astype(np.float32)


def decisions(
    plan: FramePlan, before: Masklets, tracks: np.ndarray, offset: int, names: dict[int, int]
) -> Decisions:
    """Our plan in the oracle's words: one phrase's, with its own identities."""
    output = plan.output
    phrase = {i: names[i] for i in output.ids.tolist() if i in names}
    rows = [r for r in np.argsort(before.ids) if before.ids[r] in names]
    born = [d for d in output.detections[np.isin(output.ids, list(names))] if d >= 0]
    pointers = {names[before.ids[r]]: plan.pointers[r] - offset for r in rows}
    masks = np.where(plan.suppressed[: len(tracks), None, None], np.float32(-10), tracks)
    scores = dict(zip(output.ids.tolist(), output.tracker_scores.tolist(), strict=True))
    return Decisions(
        born=[int(d) - offset for d in born],
        removed={phrase[i] for i in output.removed.tolist() if i in phrase},
        hidden={phrase[i] for i in output.ids[output.hidden].tolist() if i in phrase},
        pointers={i: int(d) for i, d in pointers.items() if d >= -offset and d + offset >= 0},
        masks=masks[rows],
        tracker_scores={phrase[i]: scores[i] for i in phrase},
        dropped=int(plan.dropped),
    )


@pytest.mark.parametrize(
    ("phrases", "backward", "changes"),
    [
        (2, False, {}),
        (2, True, {"occlusion_iou": 0.0}),  # going backwards ours differs, and says so
        (1, False, {"max_objects": 3, "hotstart": 0, "keep_alive_counts_empty": True}),
    ],
    ids=["forward", "backward", "limited"],
)
def test_plans_are_those_of_transformers(phrases, backward, changes):
    """Phrases planned together are as each alone; rows come and go without a new program."""
    config = ConceptConfig(**(QUICK | changes))
    overlaps = jax.jit(partial(measure, config))
    worlds = [World(seed) for seed in range(phrases)]
    oracles = [Planner(config) for _ in worlds]
    names: list[dict[int, int]] = [{} for _ in worlds]  # our identity -> the oracle's
    table = masklets.empty(ROWS)
    happened = dict.fromkeys(("born", "removed", "hidden", "pointers", "dropped", "masks"), 0)
    garbage = np.random.default_rng(9)

    for step in range(40):
        frame = 60 - step if backward else step
        tracks = garbage.normal(size=(ROWS, SIDE, SIDE)).astype(np.float32)  # in free rows
        logits = garbage.normal(2, 2, ROWS).astype(np.float32)
        found = garbage.normal(size=(DETECTIONS, SIDE, SIDE)).astype(np.float32)
        kept, scores = np.zeros(DETECTIONS, bool), garbage.random(DETECTIONS).astype(np.float32)
        label = np.repeat(np.arange(phrases), DETECTIONS // phrases).astype(np.int32)
        expected = []
        for p, (world, oracle) in enumerate(zip(worlds, oracles, strict=True)):
            ids, offset = oracle.ids, p * DETECTIONS // phrases
            masks, track_logits = world.propagate(ids)
            seen, seen_scores = world.detect()
            here = slice(offset, offset + len(seen))
            found[here], scores[here], kept[here] = seen, seen_scores, True
            ours = {theirs: our for our, theirs in names[p].items()}
            for i, mask, logit in zip(ids, masks, track_logits, strict=True):
                row = table.row_of(ours[i])
                tracks[row], logits[row] = mask, logit
            expected.append(
                oracle.plan(seen, seen_scores, masks, track_logits, frame, backward=backward)
            )
        numbers = overlaps(found, kept, tracks, table.live)
        detected = Detected(scores, kept, label)
        plan = plan_frame(config, table, detected, numbers, logits, frame, backward=backward)
        for p, want in enumerate(expected):
            of_phrase = plan.output.ids[plan.output.phrases == p].tolist()
            for i in of_phrase:
                names[p].setdefault(i, len(names[p]))
            live = {i: names[p][i] for i in of_phrase}
            got = decisions(plan, table, tracks, p * DETECTIONS // phrases, live)
            np.testing.assert_array_equal(got.masks, want.masks)
            assert got.tracker_scores == pytest.approx(want.tracker_scores, rel=1e-6)
            rest = {"masks": None, "tracker_scores": None}
            assert got._replace(**rest) == want._replace(**rest), f"phrase {p}, frame {frame}"
            for name in happened:
                value = getattr(want, name)
                happened[name] += int((value == -10).any()) if name == "masks" else bool(value)
        table = plan.table
    assert overlaps._cache_size() == 1
    assert len(table.ids) == ROWS
    # The comparison is worth something only if all of it occurs.
    never = {name for name, times in happened.items() if not times}
    expected_never = {"dropped"} if "max_objects" not in changes else {"removed"}
    assert never == expected_never | ({"masks"} if backward else set()), happened


def test_masks_for_memory_are_those_of_transformers(rng):
    masks = scipy.ndimage.gaussian_filter(rng.standard_normal((6, 18, 18)), (0, 2, 2))
    masks = (40 * masks).astype(np.float32)
    masks[2] = masks[1] - 0.5  # loses nearly everything
    masks[4] = -3
    size = (72, 72)
    ids, phrases = jnp.arange(6), jnp.asarray([0, 0, 0, 1, 1, 1])
    plan = jax.jit(partial(memory_masks, shrink_ratio=0.3, size=size))
    planned = plan(jnp.asarray(masks), jnp.zeros(6, bool), phrases, ids)
    expected = np.concatenate([capped_masks(masks[:3], size), capped_masks(masks[3:], size)])
    # Interpolated in float32, in another order; logits are up to 40.
    encoded = jax.jit(encoder_masks, static_argnums=1)(planned, size)
    np.testing.assert_allclose(encoded, expected, atol=2e-5)
    assert planned.capped.tolist() == [False, False, True, False, True, False]


# ------------------------------------------------------------------------------------- by hand


def flat_measures(
    overlap: np.ndarray, *, areas: np.ndarray | None = None, between: np.ndarray | None = None
) -> Measures:
    n = overlap.shape[1]
    return Measures(
        detection_track=overlap,
        track_track=np.eye(n),
        track_area=np.full(n, 9) if areas is None else areas,
        detection_detection=np.zeros((0, 0)) if between is None else between,
    )


def detected(scores: list[float], phrases: list[int] | None = None) -> Detected:
    n = len(scores)
    return Detected(
        np.asarray(scores, np.float32), np.ones(n, bool), np.asarray(phrases or [0] * n, np.int32)
    )


def test_births_continue_identities_and_grow_the_table():
    config = ConceptConfig(bucket_size=4, confirmation=True)
    table = masklets.empty(4)
    nothing = np.zeros(4, np.float32)
    first = plan_frame(
        config, table, detected([0.6, 0.9, 0.8], [1, 0, 1]), flat_measures(np.zeros((3, 4))),
        nothing, 0,
    )  # fmt: skip
    assert first.born_detections.tolist() == [0, 1, 2]
    assert first.table.ids.tolist() == [0, 1, 2, -1]
    assert first.table.groups.tolist()[:3] == [0, 1, 0]
    assert first.output.scores.tolist() == first.output.tracker_scores.tolist()
    assert first.output.rows.tolist() == [-1, -1, -1]
    assert first.output.unconfirmed.tolist() == [0, 1, 2]
    overlap = np.zeros((4, 4))
    overlap[0, 1], overlap[1, 0], overlap[2, 2] = 0.6, 0.9, 0.9
    seen = detected([0.9, 0.95, 0.8, 0.75], [0, 1, 1, 0])
    second = plan_frame(config, first.table, seen, flat_measures(overlap), nothing + 2, 16)
    assert second.born_detections.tolist() == [3]
    assert second.born_rows.tolist() == [3]
    assert second.pointers.tolist() == [1, -1, 2, -1]
    assert second.conditioning.tolist() == [True, False, True, False]
    assert second.output.rows.tolist() == [0, 1, 2, -1]
    assert second.output.detections.tolist() == [-1, -1, -1, 3]
    assert second.table.streak.tolist() == [2, 2, 2, 1]
    many = detected([0.9] * 3)
    third = plan_frame(config, second.table, many, flat_measures(np.zeros((3, 4))), nothing, 17)
    assert third.born_rows.tolist() == [4, 5, 6]
    assert len(third.table.ids) == 8
    for column in (third.suppressed, third.pointers, third.conditioning, third.removed):
        assert len(column) == 8
    assert third.output.ids.tolist() == [0, 1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(third.output.tracker_scores[:4], 0.5, rtol=1e-6)


def test_unsearched_phrases_and_clicked_objects_stand_still():
    table, _ = masklets.add(
        masklets.empty(4), np.asarray([0, 1, -1], np.int32), np.ones(3, np.float32),
        frame=0, keep_alive=30,
    )  # fmt: skip
    measures, logits = flat_measures(np.zeros((0, 4))), np.zeros(4, np.float32)
    plan = plan_frame(ConceptConfig(), table, detected([]), measures, logits, 1, unsearched=(1,))
    assert plan.table.unmatched.tolist() == [1, 0, 0, 0]
    assert plan.table.keep_alive.tolist() == [29, 30, 30, 0]
    for frame in range(2, 12):
        plan = plan_frame(ConceptConfig(), plan.table, detected([]), measures, logits, frame,
                          unsearched=(1,))  # fmt: skip
    assert plan.table.ids.tolist() == [-1, 1, 2, -1], "phrase 0 lost its object on frame 8"


def test_removal_ends_an_identity_on_its_frame():
    table, _ = masklets.add(
        masklets.empty(4), np.zeros(2, np.int32), np.ones(2, np.float32), frame=0, keep_alive=30
    )
    table = table._replace(unmatched=np.asarray([7, 0, 0, 0], np.int32))
    overlap = np.asarray([[0.0, 0.9, 0, 0]])
    plan = plan_frame(
        ConceptConfig(), table, detected([0.9]), flat_measures(overlap), np.zeros(4, np.float32), 8
    )
    assert plan.removed.tolist() == [True, False, False, False]
    assert plan.output.removed.tolist() == [0]
    assert plan.output.ids.tolist() == [0, 1], "outputs that wait know it until it is hidden"
    assert plan.table.ids.tolist() == [-1, 1, -1, -1]


def test_collisions_between_phrases_are_decided_at_birth():
    table, _ = masklets.add(
        masklets.empty(4), np.zeros(1, np.int32), np.ones(1, np.float32), frame=0, keep_alive=30
    )
    masks = np.full((5, SIDE, SIDE), -5.0, np.float32)
    for mask, columns in zip(masks, ((0, 8), (0, 9), (12, 16), (12, 17), (20, 24)), strict=True):
        mask[:, slice(*columns)] = 5.0
    tracks = np.full((4, SIDE, SIDE), -5.0, np.float32)
    tracks[0, :, :8] = 5.0
    seen = detected([0.9, 0.99, 0.8, 0.85, 0.9], [0, 1, 0, 1, 1])
    given = [jnp.asarray(x) for x in (masks, seen.kept, tracks, table.live)]
    numbers = jax.jit(partial(measure, ConceptConfig(collision_overlap=0.7)))(*given)
    born = {}
    for threshold in (0.0, 0.7):
        config = ConceptConfig(collision_overlap=threshold)
        plan = plan_frame(config, table, seen, numbers, np.zeros(4, np.float32), 1)
        born[threshold] = plan.born_detections.tolist()
    # 0 is the masklet; 1 is the same for another phrase; 2 and 3 are one thing, 3 scores better.
    assert born == {0.0: [1, 2, 3, 4], 0.7: [3, 4]}
