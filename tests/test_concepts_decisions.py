"""Concept tracking's decisions on a handful of numbers, each worked out by hand."""

from __future__ import annotations

import io

import numpy as np
import pytest

from sam3_jax.tracking.concepts import masklets
from sam3_jax.tracking.concepts.association import Matches, associate
from sam3_jax.tracking.concepts.births import within_limit, without_collisions
from sam3_jax.tracking.concepts.config import ConceptConfig, sam3_1
from sam3_jax.tracking.concepts.confirmation import confirm, unconfirmed
from sam3_jax.tracking.concepts.hotstart import count_frame, hidden, on_probation, removals
from sam3_jax.tracking.concepts.masklets import UNSEEN, Masklets
from sam3_jax.tracking.concepts.occlusion import note_occlusion, recently_occluded
from sam3_jax.tracking.concepts.outputs import FrameOutput, output_delay, release
from sam3_jax.tracking.concepts.reconditioning import recondition


def table_of(count: int, *, phrases: list[int] | None = None, frame: int = 0, rows: int = 6):
    """A table with ``count`` masklets 0, 1, ... born on ``frame``."""
    phrases = np.asarray(phrases or [0] * count, np.int32)
    scores = np.full(count, 0.9, np.float32)
    table, _ = masklets.add(masklets.empty(rows), phrases, scores, frame=frame, keep_alive=30)
    return table


def matches_of(table: Masklets, pairs: list[list[int]], unmatched: tuple[int, ...] = ()):
    """One detection for each list in ``pairs``, of the rows that it matches."""
    n = len(table.ids)
    found = Matches(
        pairs=np.zeros((len(pairs), n), bool),
        unmatched=np.zeros(n, bool),
        empty=np.zeros(n, bool),
        new=np.zeros(len(pairs), bool),
        supported=np.full(n, -1, np.int32),
    )
    for row, matched in zip(found.pairs, pairs, strict=True):
        row[matched] = True
    found.unmatched[list(unmatched)] = True
    return found


def change(column: np.ndarray, values: dict[int, object]) -> np.ndarray:
    column = column.copy()
    for row, value in values.items():
        column[row] = value
    return column


def where(flags: np.ndarray) -> list[int]:
    return np.flatnonzero(flags).tolist()


# ---------------------------------------------------------------------------------- the table


def test_rows_are_used_again_and_identities_are_not():
    table = table_of(3)
    assert table.ids.tolist() == [0, 1, 2, -1, -1, -1]
    assert table.groups[:3].tolist() == [0, 0, 0]
    table.duplicates[0, 1] = table.duplicates[1, 2] = 5
    gone = masklets.remove(table, table.ids == 1)
    new, rows = masklets.add(
        gone, np.asarray([1, 0, 1]), np.asarray([0.5, 0.6, 0.7]), frame=4, keep_alive=7
    )
    assert rows.tolist() == [1, 3, 4]
    assert new.ids.tolist() == [0, 3, 2, 4, 5, -1]
    assert new.groups[rows].tolist() == [3, 4, 3]  # by phrase and frame of birth
    assert new.born[rows].tolist() == [4, 4, 4]
    assert new.keep_alive[rows].tolist() == [7, 7, 7]
    assert new.duplicates[0].tolist() == [0] * 6
    assert new.duplicates[1].tolist() == [0] * 6
    assert (gone.ids == [0, -1, 2, -1, -1, -1]).all(), "tables are not written to"
    assert new.row_of(5) == 4
    with pytest.raises(KeyError, match="no object 1; tracked now: 0, 2, 3, 4, 5"):
        new.row_of(1)
    with pytest.raises(KeyError, match="no object -1"):
        new.row_of(-1)
    with pytest.raises(ValueError, match="2 new objects, but 1 of 6 rows are free"):
        masklets.add(new, np.zeros(2, int), np.zeros(2), frame=0, keep_alive=0)


def test_the_table_grows_by_buckets_and_is_saved_as_arrays():
    table = table_of(5)._replace(confirmed=np.asarray([1, 0, 0, 0, 1, 0], bool))
    assert masklets.with_room(table, 1, 4) is table
    more = masklets.with_room(table, 2, 4)
    assert len(more.ids) == 8
    assert more.duplicates.shape == (8, 8)
    for name, old, new in zip(Masklets._fields, table, more, strict=True):
        np.testing.assert_array_equal(new[tuple(map(slice, old.shape))], old, err_msg=name)
    assert where(more.live) == [0, 1, 2, 3, 4]
    file = io.BytesIO()
    np.savez(file, **more._asdict())
    file.seek(0)
    with np.load(file) as saved:
        again = Masklets(**saved)
    for name, old, new in zip(Masklets._fields, more, again, strict=True):
        np.testing.assert_array_equal(new, old, err_msg=name)
        assert new.dtype == old.dtype


# -------------------------------------------------------------------------------- association


def test_association_is_many_to_many():
    overlap = np.asarray([[0.9, 0.12, 0.0], [0.3, 0.05, 0.09], [0.0, 0.0, 0.09], [0.0, 0.0, 0.0]])
    scores = np.asarray([0.85, 0.95, 0.7, 0.69])
    found = associate(ConceptConfig(), overlap, scores, np.asarray([50, 40, 0]))
    assert found.pairs.tolist() == [[True, True, False], [True, False, False], *[[False] * 3] * 2]
    assert where(found.new) == [2], "the last one's score is below .7"
    assert where(found.unmatched) == [1], "an empty mask is not unmatched"
    assert where(found.empty) == [2]
    assert found.supported.tolist() == [0, -1, -1]


def test_of_two_sure_detections_the_later_one_supports():
    overlap = np.asarray([[0.85, 0.85], [0.8, 0.1], [0.9, 0.0]])
    scores = np.asarray([0.8, 0.8, 0.79])
    found = associate(ConceptConfig(), overlap, scores, np.asarray([9, 9]))
    assert found.supported.tolist() == [1, -1]  # of equal overlaps the first masklet
    strict = associate(ConceptConfig(unambiguous=True), overlap, scores, np.asarray([9, 9]))
    assert strict.supported.tolist() == [-1, -1]
    assert not strict.pairs[0].any()
    assert where(strict.unmatched) == []


def test_frames_without_masklets_or_detections():
    scores = np.asarray([0.55, 0.75])
    nothing = np.zeros(0, int)
    config = ConceptConfig()
    assert where(associate(config, np.zeros((2, 0)), scores, nothing).new) == [0, 1]
    config.new_score_always = True
    assert where(associate(config, np.zeros((2, 0)), scores, nothing).new) == [1]
    alone = associate(config, np.zeros((0, 2)), np.zeros(0), np.asarray([3, 0]))
    assert where(alone.unmatched) == [0]
    assert alone.supported.tolist() == [-1, -1]


def test_hungarian_gives_a_detection_to_one_masklet():
    overlap = np.asarray([[0.9, 0.8]])
    config, areas = ConceptConfig(), np.asarray([5, 5])
    assert where(associate(config, overlap, np.asarray([0.9]), areas).unmatched) == []
    config.one_to_one = True
    found = associate(config, overlap, np.asarray([0.9]), areas)
    assert where(found.unmatched) == [1]
    assert found.pairs.all(), "matches stay many to many"


# ------------------------------------------------------------------------------------- births


def test_the_limit_keeps_the_best():
    new, scores = np.asarray([1, 1, 0, 1, 1], bool), np.asarray([0.7, 0.9, 0.99, 0.8, 0.9])
    assert within_limit(new, scores, 9).tolist() == [0, 1, 3, 4]
    assert within_limit(new, scores, 3).tolist() == [1, 4, 3]
    assert within_limit(new, scores, 0).tolist() == []
    assert within_limit(new, scores, -2).tolist() == []


def test_who_comes_first_keeps_the_object():
    phrases = np.asarray([0, 1, 1, 0, 1])
    scores = np.asarray([0.8, 0.9, 0.95, 0.7, 0.75])
    between = np.eye(5)
    for i, j in ((0, 1), (3, 4), (1, 2)):
        between[i, j] = between[j, i] = 0.6
    taken = np.asarray([0.0, 0.0, 0.65, 0.0, 0.0])
    new = np.ones(5, bool)
    # 2 is on another phrase's masklet. 1 beats 0. 4 beats 3. 1 and 2 are of one phrase.
    assert where(without_collisions(new, scores, phrases, between, taken, 0.6)) == [1, 4]
    assert where(without_collisions(new, scores, phrases, between, taken, 0.61)) == [0, 1, 3, 4]
    new[1] = False
    assert where(without_collisions(new, scores, phrases, between, taken, 0.6)) == [0, 4]


# ----------------------------------------------------------------------------------- hotstart


def test_a_masklet_without_detections_goes_on_the_eighth_frame():
    config, table = ConceptConfig(), table_of(2)
    for frame in range(1, 9):
        unmatched = (0,) if frame == 3 else (0, 1)
        table = count_frame(config, table, matches_of(table, [[1]], unmatched), backward=False)
        gone = where(removals(config, table, frame, backward=False))
        assert gone == ([0] if frame == 8 else [])
    assert table.unmatched[:2].tolist() == [8, 7]
    assert table.keep_alive[:2].tolist() == [22, 29]  # loosely matched and strictly not
    # The second's eighth frame comes when it is 15 frames old, or just before.
    table = table._replace(unmatched=change(table.unmatched, {1: 8}))
    assert where(removals(config, table, 14, backward=False)) == [0, 1]
    assert where(removals(config, table, 15, backward=False)) == []
    pinned = table._replace(pinned=change(table.pinned, {0: True}))
    assert where(removals(config, pinned, 14, backward=False)) == [1]
    config.hotstart = 0
    assert where(removals(config, table, 0, backward=False)) == []


def test_probation_goes_with_the_direction():
    table = table_of(2)._replace(born=np.asarray([10, 30, 0, 0, 0, 0]))
    config = ConceptConfig()
    assert where(on_probation(config, table, 24, backward=False)) == [0, 1]
    assert where(on_probation(config, table, 25, backward=False)) == [1]
    assert where(on_probation(config, table, 16, backward=True)) == [0, 1]
    assert where(on_probation(config, table, 15, backward=True)) == [0]


def test_the_younger_of_two_on_one_detection_goes():
    config = ConceptConfig(hotstart_duplicate=2)
    table = table_of(3)._replace(born=np.asarray([5, 3, 3, 0, 0, 0]))
    for times, gone in ((1, []), (2, [0, 2])):
        table = count_frame(config, table, matches_of(table, [[0, 1, 2], [0]]), backward=False)
        assert table.duplicates[1].tolist() == [times, 0, times, 0, 0, 0]
        assert where(removals(config, table, 8, backward=False)) == gone
    # Three detections on different pairs: no pair of them twice.
    table = table_of(3)
    found = matches_of(table, [[0, 1], [1, 2], [0, 2]])
    table = count_frame(config, table, found, backward=False)
    assert where(removals(config, table, 2, backward=False)) == []
    assert table.duplicates[0, :3].tolist() == [0, 1, 1]
    back = count_frame(config, table_of(2)._replace(born=np.arange(6)), found, backward=True)
    assert back.duplicates[1, 0] == 1, "going backwards the later one was there first"


def test_keep_alive_hides_only_if_asked_to():
    config, table = ConceptConfig(keep_alive_max=2), table_of(3)
    table = table._replace(keep_alive=np.asarray([1, 1, 2, 0, 0, 0]))
    found = matches_of(table, [[2]], unmatched=(0,))
    found.empty[1] = True
    counted = count_frame(config, table, found, backward=False)
    assert counted.keep_alive[:3].tolist() == [0, 1, 2]
    assert where(hidden(config, counted)) == []
    config.hide_unmatched = True
    assert where(hidden(config, counted)) == [0]
    config.keep_alive_counts_empty = True
    counted = count_frame(config, table, found, backward=False)
    assert counted.keep_alive[:3].tolist() == [0, 0, 2]
    assert where(hidden(config, counted)) == [0], "1 was never unmatched"
    for _ in range(4):
        counted = count_frame(config, counted, found, backward=False)
    assert counted.keep_alive[0] == -1, "no lower than keep_alive_min"


# ----------------------------------------------------------------- reconditioning, occlusion


def test_reconditioning_takes_those_born_together_along():
    table = table_of(4, phrases=[0, 0, 1, 0])
    table = table._replace(groups=np.asarray([0, 0, 2, 3, 0, 0]))  # rows 4 and 5 are free
    supported = np.asarray([-1, 7, 5, 4, 9, 9])
    logits = np.asarray([5.0, 0.81, 0.8, 3.0, 9.0, 9.0])
    due = recondition(ConceptConfig(), table, supported, logits, 32)
    assert due.detections.tolist() == [-1, 7, -1, 4, -1, -1]
    assert where(due.conditioning) == [0, 1, 3]
    alone = recondition(ConceptConfig(recondition_together=False), table, supported, logits, 32)
    assert where(alone.conditioning) == [1, 3]
    assert not recondition(ConceptConfig(), table, supported, logits, 33).conditioning.any()
    never = recondition(ConceptConfig(recondition_every=0), table, supported, logits, 0)
    assert not never.conditioning.any()


def test_the_more_recently_hidden_gives_way_if_the_other_was_hidden_too():
    table = table_of(5, phrases=[0, 0, 0, 0, 1])
    table = table._replace(last_occluded=np.asarray([4, 9, -1, 9, 2, 9]))
    iou = np.eye(6)
    for i, j in ((0, 1), (1, 2), (0, 3), (3, 4), (0, 5)):
        iou[i, j] = iou[j, i] = 0.7
    config, none = ConceptConfig(), np.zeros(6, bool)

    def gives_way(ending: np.ndarray = none, *, backward: bool = False) -> list[int]:
        return where(recently_occluded(config, table, iou, ending, backward=backward))

    assert gives_way() == [1, 3]
    assert gives_way(backward=True) == [0]
    iou[0, 1] = iou[1, 0] = 0.69
    assert gives_way() == [3]
    # The third ends now: that it was never hidden has been seen, unless it was born just before.
    ending = change(none, {2: True})
    assert gives_way(ending) == [3]
    table = table._replace(last_occluded=change(table.last_occluded, {2: UNSEEN}))
    assert gives_way(ending) == [2, 3]
    assert gives_way(ending, backward=True) == [0, 2]
    assert gives_way() == [3]
    table = table._replace(pinned=change(table.pinned, {3: True}))
    assert gives_way(ending) == [2], "a clicked masklet stays"
    areas = np.asarray([9, 9, 9, 9, 0, 0])
    noted = note_occlusion(config, table, areas, change(none, {3: True}), 12)
    assert noted.last_occluded[:5].tolist() == [4, 9, -1, 12, 12]
    config.occlusion_iou = 0.0
    assert gives_way() == []
    assert note_occlusion(config, table, areas, table.pinned, 12) is table


# ---------------------------------------------------------------------- confirmation, outputs


def test_three_frames_running_confirm_for_good():
    config, table = ConceptConfig(confirmation=True), table_of(3)
    everything = table.live
    frames = [(0, 1, 2), (0, 1), (0, 2), (2,), (2,), ()]
    expected = [[0, 1, 2], [0, 1, 2], [1, 2], [1, 2], [1], [1]]
    for seen, waiting in zip(frames, expected, strict=True):
        detected = np.isin(np.arange(6), seen)
        table = confirm(config, table, detected, everything)
        assert where(unconfirmed(config, table)) == waiting
    # A frame on which nobody looked for the phrase neither counts nor breaks the run.
    unseen = np.zeros(6, bool)
    still = confirm(config, table_of(1)._replace(streak=np.full(6, 2, np.int32)), unseen, unseen)
    assert still.streak[0] == 2
    clicked = masklets.clicked(table, 1, confirmation_frames=3)
    assert where(unconfirmed(config, clicked)) == []
    assert (clicked.scores[1], clicked.streak[1]) == (1, 3)
    assert where(unconfirmed(ConceptConfig(), table)) == []


def output_of(frame: int, ids: list[int], *, removed=(), unconfirmed=(), hidden=()) -> FrameOutput:
    m = len(ids)
    return FrameOutput(
        frame=np.asarray(frame),
        ids=np.asarray(ids, np.int32),
        phrases=np.zeros(m, np.int32),
        scores=np.ones(m, np.float32),
        tracker_scores=np.ones(m, np.float32),
        rows=np.arange(m, dtype=np.int32),
        detections=np.full(m, -1, np.int32),
        hidden=np.isin(ids, hidden),
        removed=np.asarray(removed, np.int32),
        unconfirmed=np.asarray(unconfirmed, np.int32),
    )


def test_outputs_wait_for_removals_and_confirmations():
    config = sam3_1()
    waiting = [
        output_of(0, [0, 1, 2], unconfirmed=[0, 1, 2]),
        output_of(1, [0, 1, 2, 3], unconfirmed=[0, 1, 2, 3], hidden=[1]),
        output_of(2, [0, 1, 2, 3], unconfirmed=[2, 3], removed=[0]),
        output_of(3, [1, 2, 3], unconfirmed=[2, 3]),
    ]

    def shown(delay: int, *, finished: bool = False) -> list[list[int]]:
        due = release(config, waiting, delay=delay, finished=finished)
        return [output.ids[flags].tolist() for output, flags in due]

    assert shown(5) == []
    assert shown(4) == [[1]]
    assert shown(3) == [[1], []]
    everything = [[1], [], [1], [1]]  # at the end, the last frame's confirmations count
    assert shown(9, finished=True) == everything
    assert shown(0) == shown(1) == everything
    assert release(config, [], delay=0, finished=True) == []
    config.confirmation = False
    open_minded = [output._replace(unconfirmed=np.zeros(0, np.int32)) for output in waiting]
    due = release(config, open_minded, delay=4, finished=False)
    assert [output.ids[flags].tolist() for output, flags in due] == [[1, 2]]


def test_the_first_output_comes_at_the_fifteenth_frame():
    delay = output_delay(ConceptConfig())
    waiting = [output_of(i, [0]) for i in range(15)]
    assert release(ConceptConfig(), waiting[:14], delay=delay, finished=False) == []
    ((first, _),) = release(ConceptConfig(), waiting, delay=delay, finished=False)
    assert first.frame == 0
    assert output_delay(ConceptConfig(hotstart=0)) == 1
    assert output_delay(ConceptConfig(hotstart=0, confirmation=True)) == 3
