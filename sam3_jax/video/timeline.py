"""A session's place in its video: frame by frame in either direction, and back to any frame.

Going back restores the nearest snapshot before a frame and computes from there; without one, from
the pass's first frame. What a user said later than a snapshot is applied to it again.
"""

from __future__ import annotations

import itertools

import numpy as np
from jaxtyping import Bool, Int

from sam3_jax.tracking.concepts import masklets
from sam3_jax.tracking.concepts.masklets import NONE
from sam3_jax.tracking.memories import frame_at
from sam3_jax.video.concept_loop import track_concepts
from sam3_jax.video.display import Seen, empty_output
from sam3_jax.video.edits import Edit, Edits
from sam3_jax.video.features import Encoded, Features
from sam3_jax.video.frames import VideoError
from sam3_jax.video.object_loop import remember_prompts, track_objects
from sam3_jax.video.phrases import Phrase
from sam3_jax.video.snapshots import Snapshots, put_back
from sam3_jax.video.tracked import Kit, nothing_tracked

REFINED = 16  # frames around a click where conditioning on detections is dropped
LATER = 1_000_000  # ids of objects that are clicked after phrases have been tracked begin here


class Timeline:
    """What is tracked, everything that was said about it, and how to get to another frame."""

    def __init__(self, kit: Kit, features: Features):
        self.kit, self.features = kit, features
        self.phrases: list[Phrase] = []
        self.edits = Edits()
        self.clicked: dict[int, int] = {}  # objects that a user made: the frame of the first prompt
        self.dropped: set[int] = set()  # objects that a user removed
        self.first_id: int | None = None  # of what phrases find
        self.next_id = 0  # above everything that phrases have ever found
        self.waiting: list[Seen] = []  # tracked, not shown yet
        self.moves = 0  # how often the place has changed other than by a step
        config = kit.config
        limit = config.snapshot_bytes if features.total is not None else 0
        self.snapshots = Snapshots(config.snapshot_every, limit)
        self.tracking = nothing_tracked(kit)
        self._only: set[int] | None = None  # edits that count while past frames are repeated

    # ------------------------------------------------------------------ what is said

    def new_id(self) -> int:
        """The identity of the next object that a user makes."""
        used = (*self.clicked, *self.dropped)
        if self.first_id is None:
            return max(used, default=-1) + 1
        if self.tracking.index is None:  # phrases have found nothing yet, and begin behind it
            self._count_from(self.first_id + 1)
            return self.first_id - 1
        return max((i for i in used if i >= LATER), default=LATER - 1) + 1

    def add_phrase(self, phrase: Phrase) -> None:
        """What is tracked begins anew, but in a stream, where it is joined."""
        self.phrases.append(phrase)
        if self.first_id is None:
            self._count_from(max((*self.clicked, *self.dropped), default=-1) + 1)
        self.phrases_changed()

    def phrases_changed(self) -> None:
        """Earlier states did not look for what is looked for now.

        Where all begins anew, what was said about objects that phrases had found means nothing any
        more, and their numbers are not used again.
        """
        self.snapshots.clear()
        if self.tracking.index is None or self.features.total is not None:
            for object_id in {e.object_id for e in self.edits} - self.clicked.keys():
                self.edits.drop(object_id)
            self._count_from(max(self.first_id, self.next_id))
            self.begin()

    def _count_from(self, number: int) -> None:
        """Phrases number what they find from here on."""
        self.first_id = number
        table = self.tracking.table
        self.tracking.table = table._replace(next_id=np.asarray(number, np.int32))

    def begin(self) -> None:
        """Nothing is tracked but what a user made."""
        rows = self.tracking.buckets.rows
        self.waiting.clear()
        self.moves += 1
        self.tracking = nothing_tracked(self.kit)  # the old states go before new ones are made
        self.tracking.buckets.reserve(rows)
        table = masklets.grow(self.tracking.table, rows)
        self.tracking.table = table._replace(next_id=np.asarray(self.first_id or 0, np.int32))
        self.make_clicked()

    def make_clicked(self) -> None:
        """Rows for a user's objects that have none, and none for those that were removed."""
        tracking, table = self.tracking, self.tracking.table
        tracking.remove(self.removed(table.ids) & (table.phrases == NONE))
        for object_id, frame in sorted(self.clicked.items()):
            if not tracking.has(object_id):
                tracking.add_clicked(object_id, frame, together=not self.phrases)

    def add_clicked(self, frame: int) -> int:
        """A new object of a user's."""
        object_id = self.new_id()
        self.clicked[object_id] = frame
        self.make_clicked()
        return object_id

    def remove(self, object_id: int) -> None:
        """Ends an object for good.

        One that a phrase found is followed on, unseen: its phrase would find it anew.
        """
        self.edits.drop(object_id)
        self.clicked.pop(object_id, None)
        self.dropped.add(object_id)
        self.make_clicked()
        for seen in self.waiting:
            seen.output.hidden[seen.output.ids == object_id] = True

    def removed(self, ids: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Which identities a user has removed."""
        return np.isin(ids, list(self.dropped))

    def row_of(self, object_id: int) -> int:
        """Where an object is tracked.

        Raises:
          KeyError: for one that is unknown or was removed, with those that there are.
        """
        table = self.tracking.table
        if object_id not in self.dropped:
            return table.row_of(object_id)
        there = np.sort(table.ids[table.live & ~self.removed(table.ids)])
        known = ", ".join(map(str, there)) or "none"
        raise KeyError(f"object {object_id} was removed; tracked now: {known}")

    def changed(self, frame: int) -> None:
        """A prompt on a frame was added or replaced."""
        self.snapshots.drop_from(frame)

    def apply_edits(self) -> None:
        """Remembers prompts that the memories do not hold yet.

        Those of one frame together, because their masks must not overlap.
        """
        tracking = self.tracking
        self.make_clicked()
        for frame in self.edits.frames:
            edits = self._edits_on(frame)
            if all(e.serial in tracking.applied for e in edits):
                continue
            self._apply(frame, edits)
            tracking.applied |= {e.serial for e in edits}

    def _edits_on(self, frame: int) -> list[Edit]:
        """Prompts of a frame that can be applied now."""
        known = [e for e in self.edits.on(frame) if self.tracking.has(e.object_id)]
        return [e for e in known if self._only is None or e.serial in self._only]

    def _apply(self, frame: int, edits: list[Edit]) -> None:
        tracking, table = self.tracking, self.tracking.table
        levels = self.features.tracker(frame)
        for edit in edits:
            row = table.row_of(edit.object_id)
            if table.phrases[row] != NONE and edit.serial not in tracking.applied:
                table = masklets.clicked(
                    table, row, confirmation_frames=self.kit.config.concepts.confirmation_frames
                )
                self._forget_detections(row, frame)
        tracking.table = table
        now = frame_at(frame, self.features.total, backward=tracking.backward)
        together = self.kit.config.tracker.selection == "session" and not self.phrases
        remember_prompts(tracking, levels, now, edits, together=together)

    def _forget_detections(self, row: int, frame: int) -> None:
        """Conditioning on detections close to a click is dropped, prompts are not."""
        tracking = self.tracking
        own = int(tracking.table.ids[row])
        prompted = sorted({e.frame for e in self.edits if e.object_id == own} | {frame})
        between = [frame - REFINED - 1, *prompted, frame + REFINED + 1]
        for before, after in itertools.pairwise(between):
            first, last = max(before + 1, frame - REFINED), min(after - 1, frame + REFINED)
            if first <= last:
                tracking.buckets.forget_conditioning(np.asarray([row]), first, last)

    # ------------------------------------------------------------------ where it is

    def step(self, encoded: Encoded) -> Seen:
        """Tracks the next frame."""
        tracking = self.tracking
        first = tracking.index is None
        seen = self._missing(encoded)
        if encoded.trunk is not None:
            levels = self.features.tracker(encoded.index, encoded.trunk)
            tracking.births.clear()  # of a frame that was interrupted
            self._apply_here(encoded.index)
            self._track(encoded, levels)
            again = first and bool(self.phrases) and self.kit.config.repeat_first
            # A prompt for an object that a phrase has found only now is looked at with it.
            if self._apply_here(encoded.index) or again:
                self._track(encoded, levels)
            tracking.births.clear()
            seen = Seen(
                tracking.latest.output,
                tracking.latest.logits,
                encoded.time,
                encoded.error,
                overlapping=not self.phrases,
            )
        tracking.index = encoded.index
        self.next_id = max(self.next_id, int(tracking.table.next_id))
        if first:
            tracking.origin = encoded.index
        self.features.passed(encoded.index, keep=bool(self.edits.on(encoded.index)))
        self.snapshots.offer(tracking)
        return seen

    def _apply_here(self, frame: int) -> bool:
        """Applies a frame's prompts whose objects have come to be; whether there were some."""
        tracking = self.tracking
        edits = self._edits_on(frame)
        new = any(e.serial not in tracking.applied for e in edits)
        if new:
            self.apply_edits()
        return new

    def _missing(self, encoded: Encoded) -> Seen:
        self.tracking.latest = None
        return Seen(empty_output(encoded.index), None, encoded.time, encoded.error)

    def _track(self, encoded: Encoded, levels: tuple) -> None:
        tracking = self.tracking
        frame = frame_at(encoded.index, self.features.total, backward=tracking.backward)
        edits = self._edits_on(encoded.index)
        if not self.phrases:
            tracking.latest = track_objects(self.kit, tracking, levels, frame, edits)
            return
        unseen = self.removed(tracking.table.ids)
        tracking.latest = track_concepts(
            self.kit, tracking, levels, encoded.trunk, frame, edits, self.phrases, unseen
        )
        output = tracking.latest.output
        output.hidden[self.removed(output.ids)] = True

    def go_to(self, start: int, *, backward: bool) -> None:
        """Makes ``start`` the next frame of a pass in a direction.

        Raises:
          VideoError: in a stream, for a frame that is gone.
        """
        self.moves += 1
        tracking, sign = self.tracking, -1 if backward else 1
        if tracking.index is not None:
            if tracking.backward == backward:
                if (start - tracking.index) * sign <= 0:
                    self.rewind(start - sign, backward=backward)
                elif start != tracking.index + sign:
                    self.waiting.clear()
            elif abs(start - tracking.index) > 1:
                self.rewind(start, backward=not backward)
        self._turn(start, backward=backward)
        self.apply_edits()

    def _turn(self, start: int, *, backward: bool) -> None:
        """Begins a pass, where it is one: in another direction, or with nothing tracked yet."""
        tracking = self.tracking
        if tracking.index is None or tracking.backward != backward:
            self.snapshots.clear(backward=backward)
        if tracking.index is not None and tracking.backward != backward:
            self.waiting.clear()
            # As if it had come from the other side; what it knows stays to be gone back to.
            tracking.index, tracking.origin = start + (1 if backward else -1), start
            tracking.backward, tracking.latest = backward, None
            self.snapshots.keep(tracking, always=True)
        tracking.backward = backward

    def rewind(self, frame: int, *, backward: bool, look: bool = False) -> None:
        """Makes what is tracked what it was after a frame of this pass, or of the one before.

        ``look``: the frame itself is tracked again, for its masks; snapshots do not have them.
        """
        if self.features.total is None:
            raise VideoError(
                f"frame {frame} of {self.features.video.name} is gone: a stream can be tracked "
                "once, forwards; record it to a file to go back"
            )
        self.waiting.clear()
        self.moves += 1
        tracking, sign = self.tracking, -1 if backward else 1
        known_edits = set(tracking.applied)
        origin = tracking.origin if tracking.backward == backward else None
        known = self.snapshots.nearest(frame - sign if look else frame, backward=backward)
        if known is not None:
            put_back(tracking, known)
            # Identities of clicked objects are not among those that are counted on.
            self.make_clicked()
        else:
            self.begin()
            self.tracking.backward = backward
        next_frame = origin if self.tracking.index is None else self.tracking.index + sign
        if next_frame is None or (frame - next_frame) * sign < 0:
            return
        # What was said since then begins to count where the pass goes on, or the result would
        # depend on how far back the snapshot is.
        self._only = known_edits
        try:
            self.apply_edits()
            for encoded in self.features.frames(next_frame, frame + sign, backward=backward):
                self.step(encoded)
        finally:
            self._only = None

    def at(self, frame: int) -> None:
        """Goes back to a frame that was tracked, to correct it; one ahead is left alone."""
        tracking = self.tracking
        if tracking.index is None or (tracking.index == frame and tracking.latest is not None):
            return
        sign = -1 if tracking.backward else 1
        if (tracking.index - frame) * sign >= 0 and (frame - tracking.origin) * sign >= 0:
            if self.features.total is None and tracking.index == frame:
                return
            self.rewind(frame, backward=tracking.backward, look=True)
