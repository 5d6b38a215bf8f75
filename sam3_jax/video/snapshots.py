"""States of a pass on the host, so that going back needs not begin at its first frame."""

from __future__ import annotations

from typing import NamedTuple

from sam3_jax.tracking.concepts import masklets
from sam3_jax.tracking.concepts.masklets import Masklets
from sam3_jax.video.buckets import Packed
from sam3_jax.video.tracked import Tracking


class Snapshot(NamedTuple):
    """What was tracked after frame ``index``; see :class:`~.tracked.Tracking`."""

    table: Masklets
    packed: Packed
    index: int | None
    origin: int | None
    backward: bool
    applied: frozenset[int]

    @property
    def done(self) -> int:
        """Frames from the pass's first to this one, -1 where the pass has not begun."""
        return (self.index - self.origin) * (-1 if self.backward else 1)

    @property
    def bytes(self) -> int:
        """Of the arrays."""
        arrays = (*self.table, *self.packed.fields.values())
        return sum(array.nbytes for array in arrays)


def take(tracking: Tracking) -> Snapshot:
    """A copy of what is tracked, on the host."""
    return Snapshot(
        tracking.table,
        tracking.buckets.pack(tracking.order),
        tracking.index,
        tracking.origin,
        tracking.backward,
        frozenset(tracking.applied),
    )


def snapshot_size(tracking: Tracking) -> int:
    """Bytes that :func:`take` would copy."""
    table = sum(column.nbytes for column in tracking.table)
    return table + tracking.buckets.packed_bytes(len(tracking.order))


def put_back(tracking: Tracking, snapshot: Snapshot) -> None:
    """Makes ``tracking`` what it was."""
    buckets = tracking.buckets
    buckets.unpack(snapshot.packed)
    buckets.reserve(len(snapshot.table.ids))
    tracking.table = masklets.grow(snapshot.table, buckets.rows)
    tracking.index, tracking.origin = snapshot.index, snapshot.origin
    tracking.backward = snapshot.backward
    tracking.applied = set(snapshot.applied)
    tracking.latest = None


class Snapshots:
    """Snapshots of a pass in each direction, at even distances, within a limit of bytes."""

    def __init__(self, every: int, limit: int):
        self._first_every = self._every = every
        self._limit = limit
        self._kept: list[Snapshot] = []

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """Of all that are kept."""
        return sum(snapshot.bytes for snapshot in self._kept)

    def offer(self, tracking: Tracking) -> None:
        """Takes one if it is time; before, drops every other one where they would be too large."""
        done = abs(tracking.index - tracking.origin)
        if done % self._every == 0:
            self.keep(tracking)

    def keep(self, tracking: Tracking, *, always: bool = False) -> None:
        """Takes one, if there is room, or ``always``; see :meth:`offer`."""
        where = tracking.index, tracking.backward
        self._kept = [s for s in self._kept if (s.index, s.backward) != where]
        size = snapshot_size(tracking)
        while self.bytes + size > self._limit and any(s.done >= 0 for s in self._kept):
            self._every *= 2
            turns = [s for s in self._kept if s.done < 0]  # nothing leads back behind them
            rest = [s for s in self._kept if s.done >= 0 and s.done % self._every == 0]
            # Those of a pass's first frame would stay for ever.
            self._kept = turns + rest if len(turns + rest) < len(self._kept) else turns
        if always or self.bytes + size <= self._limit:
            self._kept.append(take(tracking))

    def clear(self, *, backward: bool | None = None) -> None:
        """A new pass begins in one direction, or in both."""
        self._kept = [s for s in self._kept if backward is not None and s.backward != backward]
        if not self._kept:
            self._every = self._first_every

    def drop_from(self, frame: int) -> None:
        """Forgets those that know frame ``frame``, because something changed there."""
        self._kept = [s for s in self._kept if (s.index > frame if s.backward else s.index < frame)]

    def nearest(self, frame: int, *, backward: bool) -> Snapshot | None:
        """The last one at or before a frame, in the direction of a pass."""
        same = [s for s in self._kept if s.backward == backward]
        passed = [s for s in same if (s.index >= frame if backward else s.index <= frame)]
        return min(passed, key=lambda s: abs(s.index - frame), default=None)
