"""The memory of all objects of a session: buckets of slots, addressed by row.

Row ``r`` of the table of masklets is slot ``r % size`` of bucket ``r // size``. Buckets are added
and never given back, so a session's memory is that of the most objects it ever had at one time.

Objects of one group may be in several buckets. What they have in common, the score of a frame with
selection "session" and masks of prompts that do not overlap, is computed over all buckets here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sam3_jax.models.tracker import ABSENT, Tracked
from sam3_jax.tracking.memories import EMPTY, Frame
from sam3_jax.tracking.programs import Programs
from sam3_jax.tracking.state import TrackState
from sam3_jax.tracking.step import PRESENT
from sam3_jax.types import Levels


class Packed(NamedTuple):
    """What some rows remember, on the host."""

    rows: Int[np.ndarray, " k"]
    buckets: int
    fields: dict[str, np.ndarray]  # of TrackState, (k, ...)


class Buckets:
    """States of the buckets and the programs that change them; nothing else touches them."""

    def __init__(self, programs: Programs, params: dict):
        self.programs, self.params = programs, params
        self.size = programs.config.bucket_size
        self.states: list[TrackState] = []
        side = programs.model.image_size // programs.model.vision.patch_size
        self.grid = (side, side)
        self.nothing = programs.place(
            Tracked(
                np.full((self.size, 4 * side, 4 * side), ABSENT, np.float32),
                np.zeros(self.size, np.float32),
                np.full(self.size, -PRESENT, np.float32),
                np.zeros((self.size, programs.model.dim), np.float32),
            )
        )
        self._used: list[int] = []  # of each bucket: slots up to the last that is in use
        self._reads: list[int | None] = []  # prompted frames to read; None: to be counted anew

    @property
    def rows(self) -> int:
        """How many there are."""
        return self.size * len(self.states)

    @property
    def bytes(self) -> int:
        """Of all states, on the device."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.states))

    def reserve(self, rows: int) -> None:
        """Makes sure that there are so many rows."""
        while self.rows < rows:
            self.states.append(self.programs.empty_state())
            self._used.append(0)
            self._reads.append(None)

    def split(self, rows: np.ndarray) -> list[np.ndarray]:
        """Something for each row, by bucket."""
        return [rows[i : i + self.size] for i in range(0, self.rows, self.size)]

    def find(self, levels: Levels, frame: Frame) -> list[Tracked]:
        """Finds all objects in a frame; nothing is remembered."""
        found = [self.nothing] * len(self.states)
        for i in np.flatnonzero(self._used).tolist():
            found[i] = self.programs.propagate(
                self.params, self.states[i], levels, frame, **self._least(i)
            )
        return found

    def track(self, levels: Levels, frame: Frame) -> list[Tracked]:
        """Finds all objects in a frame and remembers them, but those that were prompted on it."""
        used = np.flatnonzero(self._used).tolist()
        if len(used) > 1 and self.programs.config.selection == "session":
            found = self.find(levels, frame)
            scores = self.scores(found)
            for i in used:
                self.states[i] = self.programs.memorize_tracked(
                    self.params,
                    self.states[i],
                    levels,
                    frame,
                    found[i],
                    scores[i],
                    slots=self._width(i),
                )
            return found
        found = [self.nothing] * len(self.states)
        for i in used:
            self.states[i], found[i] = self.programs.track(
                self.params, self.states[i], levels, frame, **self._least(i)
            )
        return found

    def scores(self, found: Sequence[Tracked]) -> list[Float[Array, " s"] | None]:
        """Scores of a frame for memory selection, by bucket; None: each object has its own."""
        if self.programs.config.selection != "session":
            return [None] * len(self.states)
        return list(self.programs.joint_scores(tuple(self.states), tuple(found)))

    def memorize(
        self,
        bucket: int,
        levels: Levels,
        frame: Frame,
        found: Tracked,
        write: Bool[np.ndarray, " s"],
        conditioning: Bool[np.ndarray, " s"],
        prompted: Bool[np.ndarray, " s"],
        scores: Float[Array, " s"] | None = None,
        *,
        concept: bool = False,
    ) -> None:
        """Remembers what was found of one bucket; see ``tracking.step.memorize``."""
        run = self.programs.memorize_concept if concept else self.programs.memorize
        given = self.params, self.states[bucket], levels, frame, found, write, conditioning
        self.states[bucket] = run(*given, prompted, scores, slots=self._width(bucket))
        if conditioning.any():
            self._reads[bucket] = None

    def prompt(
        self,
        levels: Levels,
        frame: Frame,
        found: Mapping[int, Tracked],
        write: Mapping[int, Bool[np.ndarray, " s"]],
    ) -> None:
        """Makes a frame a prompted one of some objects.

        Args:
          found: what the prompts said, by bucket. Masks of one group are made not to overlap,
            whichever buckets they are in.
          write: the objects, by bucket.
        """
        found = {i: self.programs.place(one) for i, one in found.items()}
        if len(found) > 1 and self.programs.config.non_overlapping_prompts:
            masks = self.programs.separate(
                tuple(one.masks for one in found.values()),
                tuple(self.states[i].group for i in found),
                tuple(write[i] for i in found),
            )
            alone = zip(found.items(), masks, strict=True)
            found = {i: one._replace(masks=own) for (i, one), own in alone}
        for i, one in found.items():
            self.memorize(i, levels, frame, one, write[i], write[i], write[i])

    def add(self, rows: Int[np.ndarray, " k"], groups: Int[np.ndarray, " k"]) -> None:
        """Gives rows to new objects of these groups."""
        for group in np.unique(groups):
            for i, slots in self._slots(rows[groups == group]):
                self.states[i] = self.programs.add(self.states[i], slots, np.int32(group))
                self._used[i] = max(self._used[i], _extent(slots))

    def remove(self, rows: Int[np.ndarray, " k"], live: Bool[np.ndarray, " n"]) -> None:
        """Frees rows; ``live``: those that are in use afterwards."""
        for i, slots in self._slots(rows):
            self.states[i] = self.programs.remove(self.states[i], slots)
            self._reads[i] = None
        self._used = [_extent(part) for part in self.split(live)]

    def forget_conditioning(self, rows: Int[np.ndarray, " k"], first: int, last: int) -> None:
        """Drops prompted frames ``first``..``last`` of these rows."""
        for i, slots in self._slots(rows):
            self.states[i] = self.programs.forget_conditioning(
                self.states[i], slots, np.int32(first), np.int32(last)
            )
            self._reads[i] = None

    def _slots(self, rows: Int[np.ndarray, " k"]) -> list[tuple[int, np.ndarray]]:
        """Buckets that have some of these rows, with their slots."""
        chosen = self.split(np.isin(np.arange(self.rows), rows))
        return [(i, slots) for i, slots in enumerate(chosen) if slots.any()]

    def packed_bytes(self, rows: int) -> int:
        """What :meth:`pack` copies of so many rows."""
        return rows * self.bytes // max(self.rows, 1)

    def pack(self, rows: Int[np.ndarray, " k"]) -> Packed:
        """Copies rows to the host."""
        fields: dict[str, list[np.ndarray]] = {name: [] for name in TrackState._fields}
        for i, slots in self._slots(rows):
            for name, value in zip(fields, jax.device_get(self.states[i]), strict=True):
                fields[name].append(np.asarray(value)[slots])
        joined = {name: np.concatenate(parts) for name, parts in fields.items() if parts}
        return Packed(np.sort(rows), len(self.states), joined)

    def unpack(self, packed: Packed) -> None:
        """Makes the buckets what they were; those that are there beyond are emptied."""
        count = max(packed.buckets, len(self.states))
        self.states, self._used, self._reads = [], [], []
        self.reserve(count * self.size)
        for i, slots in self._slots(packed.rows):
            these = packed.rows // self.size == i
            host = [np.array(leaf) for leaf in jax.device_get(self.states[i])]
            for value, name in zip(host, TrackState._fields, strict=True):
                value[slots] = packed.fields[name][these]
            self.states[i] = self.programs.place(TrackState(*jax.device_put(host)))
            self._used[i] = _extent(slots)

    def _width(self, bucket: int) -> int:
        """Slots that a program has to look at."""
        return self.programs.width(self._used[bucket])

    def _least(self, bucket: int) -> dict[str, int]:
        """The least that a program has to look at: slots, and prompted frames of them."""
        reads = self._reads[bucket]
        if reads is None:
            count = self.programs.config.stored_conditioning
            frames = jax.device_get(self.states[bucket].map_frames)[:, :count]
            most = int((frames != EMPTY).sum(axis=1).max())
            reads = self._reads[bucket] = self.programs.reads_for(most)
        return {"slots": self._width(bucket), "reads": reads}


def _extent(slots: Bool[np.ndarray, " s"]) -> int:
    """Slots up to the last of these."""
    return int(np.flatnonzero(slots).max(initial=-1)) + 1


def one_of(found: Sequence[Tracked], row: int) -> Tracked:
    """One row of what was found, on the host."""
    bucket, slot = divmod(row, len(found[0].iou))
    return Tracked(*(np.array(value[slot]) for value in jax.device_get(found[bucket])))


def with_rows(found: Tracked, ones: dict[int, Tracked]) -> Tracked:
    """A bucket's finds with some slots exchanged, on the host."""
    host = [np.array(value) for value in jax.device_get(found)]
    for slot, one in ones.items():
        for value, new in zip(host, one, strict=True):
            value[slot] = new
    return Tracked(*host)
