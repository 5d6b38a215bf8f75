"""The table of everything that is tracked: what concept tracking remembers between frames.

Numpy arrays of fixed length, one row for every slot of the tracker's buckets, so a session saves
and restores the table as it is and its size does not depend on the length of the video. Upstream
keeps dictionaries that grow: ``tracker_metadata`` in ``sam3/model/sam3_video_base.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

NONE = -1  # a free row's identity; no phrase; never occluded
UNSEEN = -2  # not yet propagated, so whether it is occluded was never looked at


class Masklets(NamedTuple):
    """One row for each masklet; ``ids`` of free rows are -1, their other columns mean nothing."""

    ids: Int[np.ndarray, " n"]  # unique within the session, never used again
    phrases: Int[np.ndarray, " n"]  # the phrase that found it; -1: a user's click
    groups: Int[np.ndarray, " n"]  # lowest id among those that its phrase found on the same frame
    born: Int[np.ndarray, " n"]  # frame
    scores: Float[np.ndarray, " n"]  # of the first detection; 1 after a click
    pinned: Bool[np.ndarray, " n"]  # clicked: no heuristic removes or hides it
    unmatched: Int[np.ndarray, " n"]  # frames without a detection, in all
    keep_alive: Int[np.ndarray, " n"]
    last_occluded: Int[np.ndarray, " n"]  # frame; -1: never; -2: born on the frame before
    streak: Int[np.ndarray, " n"]  # frames with a detection, running
    confirmed: Bool[np.ndarray, " n"]
    duplicates: Int[np.ndarray, "n n"]  # [i, j]: detections that j shared with the older i
    next_id: Int[np.ndarray, ""]

    @property
    def live(self) -> Bool[np.ndarray, " n"]:
        """Rows in use."""
        return self.ids >= 0

    def row_of(self, object_id: int) -> int:
        """Row of an identity.

        Raises:
          KeyError: with the identities that there are.
        """
        rows = np.flatnonzero(self.ids == object_id)
        if object_id < 0 or not len(rows):
            known = ", ".join(map(str, np.sort(self.ids[self.live]))) or "none"
            raise KeyError(f"no object {object_id}; tracked now: {known}")
        return int(rows[0])


def empty(rows: int) -> Masklets:
    """A table of ``rows`` free rows."""

    def column(value: int, dtype: type) -> np.ndarray:
        return np.full(rows, value, dtype)

    return Masklets(
        ids=column(NONE, np.int32),
        phrases=column(NONE, np.int32),
        groups=column(NONE, np.int32),
        born=column(0, np.int32),
        scores=column(0, np.float32),
        pinned=column(0, bool),
        unmatched=column(0, np.int32),
        keep_alive=column(0, np.int32),
        last_occluded=column(UNSEEN, np.int32),
        streak=column(0, np.int32),
        confirmed=column(0, bool),
        duplicates=np.zeros((rows, rows), np.int32),
        next_id=np.zeros((), np.int32),
    )


def grow(table: Masklets, rows: int) -> Masklets:
    """The same table with free rows appended up to ``rows``; never shrinks."""
    more = rows - len(table.ids)
    if more <= 0:
        return table
    fresh = empty(more)
    columns = {
        name: np.concatenate([old, new])
        for name, old, new in zip(Masklets._fields, table, fresh, strict=True)
        if old.ndim == 1
    }
    duplicates = np.pad(table.duplicates, (0, more))
    return Masklets(**columns, duplicates=duplicates, next_id=table.next_id)


def with_room(table: Masklets, objects: int, bucket: int) -> Masklets:
    """``table`` with at least ``objects`` free rows, grown by whole buckets where needed."""
    needed = int(table.live.sum()) + objects
    return table if needed <= len(table.ids) else grow(table, -(-needed // bucket) * bucket)


def add(
    table: Masklets,
    phrases: Int[np.ndarray, " k"],
    scores: Float[np.ndarray, " k"],
    *,
    frame: int,
    keep_alive: int,
) -> tuple[Masklets, Int[np.ndarray, " k"]]:
    """New masklets in the first free rows; identities continue in the order given.

    Returns the table and the rows.

    Raises:
      ValueError: if there are too few free rows.
    """
    free = np.flatnonzero(~table.live)
    k = len(phrases)
    if k > len(free):
        raise ValueError(f"{k} new objects, but {len(free)} of {len(table.ids)} rows are free")
    rows = free[:k]
    ids = (table.next_id + np.arange(k)).astype(np.int32)
    groups = np.asarray([ids[phrases == p].min() for p in phrases], np.int32)
    new = copy(table)
    for column, value in (
        (new.ids, ids),
        (new.phrases, phrases),
        (new.groups, groups),
        (new.born, frame),
        (new.scores, scores),
        (new.pinned, False),
        (new.unmatched, 0),
        (new.keep_alive, keep_alive),
        (new.last_occluded, UNSEEN),
        (new.streak, 0),
        (new.confirmed, False),
        (new.duplicates, 0),
    ):
        column[rows] = value
    new.duplicates[:, rows] = 0
    return new._replace(next_id=np.asarray(table.next_id + k, np.int32)), rows


def remove(table: Masklets, rows: Bool[np.ndarray, " n"]) -> Masklets:
    """Frees rows. Their identities are not given out again."""
    return table._replace(ids=np.where(rows, NONE, table.ids).astype(np.int32))


def clicked(table: Masklets, row: int, *, confirmation_frames: int) -> Masklets:
    """A user refined the masklet: its score is 1, it is confirmed and no heuristic takes it away.

    Upstream (``add_tracker_new_points`` in ``sam3/model/sam3_video_inference.py``) also sets the
    score; it writes the *unconfirmed* status with a full streak, so there the masklet is shown one
    matched frame later.
    """
    new = copy(table)
    new.scores[row] = 1.0
    new.pinned[row] = True
    new.confirmed[row] = True
    new.streak[row] = confirmation_frames
    return new


def copy(table: Masklets) -> Masklets:
    """A table that may be written to."""
    return Masklets(*(np.array(column) for column in table))
