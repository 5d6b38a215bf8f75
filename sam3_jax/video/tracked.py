"""What is tracked at a moment of a pass: identities, memories, and how far the pass has come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sam3_jax.config import ModelConfig
from sam3_jax.inference.engine import Engine
from sam3_jax.models.tracker import Tracked
from sam3_jax.tracking.concepts import masklets
from sam3_jax.tracking.concepts.masklets import NONE, Masklets
from sam3_jax.tracking.concepts.outputs import FrameOutput
from sam3_jax.tracking.programs import Programs
from sam3_jax.video.buckets import Buckets, one_of
from sam3_jax.video.concept_programs import ConceptPrograms
from sam3_jax.video.config import VideoConfig


class Kit(NamedTuple):
    """What does not change in a session."""

    engine: Engine
    programs: Programs
    concepts: ConceptPrograms
    config: VideoConfig
    size: tuple[int, int]  # (height, width) of the video

    @property
    def model(self) -> ModelConfig:
        """The model's configuration."""
        return self.engine.config


class Latest(NamedTuple):
    """The last frame: what was found, and what is shown of it."""

    output: FrameOutput
    logits: Float[Array, "n h w"]  # in the order of the output
    found: tuple[Tracked, ...]  # by bucket


class Birth(NamedTuple):
    """New objects of one bucket, and what their first prompts gave."""

    bucket: int
    ids: Int[np.ndarray, " s"]  # NONE in other slots
    found: Tracked


@dataclass
class Tracking:
    """Everything that a frame changes. ``index`` is the last frame, ``origin`` the pass's first."""

    table: Masklets
    buckets: Buckets
    index: int | None = None
    origin: int | None = None
    backward: bool = False
    applied: set[int] = field(default_factory=set)  # edits that the memories hold
    latest: Latest | None = None
    births: list[Birth] = field(default_factory=list)  # of the frame that is being looked at

    @property
    def order(self) -> Int[np.ndarray, " m"]:
        """Rows in use in the order of their identities."""
        rows = np.flatnonzero(self.table.live)
        return rows[np.argsort(self.table.ids[rows])]

    def born_here(self) -> dict[int, dict[int, Tracked]]:
        """What the first prompts of this frame's new objects gave, by bucket and slot."""
        given: dict[int, dict[int, Tracked]] = {}
        for bucket, ids, found in self.births:
            host = jax.device_get(found)
            there = (ids != NONE) & (ids == self.buckets.split(self.table.ids)[bucket])
            for slot in np.flatnonzero(there):
                one = Tracked(*(np.array(value[slot]) for value in host))
                given.setdefault(bucket, {})[int(slot)] = one
        return given

    def has(self, object_id: int) -> bool:
        """Whether an object is tracked."""
        return object_id >= 0 and bool((self.table.ids == object_id).any())

    def remove(self, rows: Bool[np.ndarray, " n"]) -> None:
        """Ends objects."""
        if rows.any():
            self.table = masklets.remove(self.table, rows)
            self.buckets.remove(np.flatnonzero(rows), self.table.live)

    def add_clicked(self, object_id: int, frame: int, *, together: bool) -> None:
        """A row for an object of a user's.

        ``together``: with the other clicked objects in one group, as in a session without phrases.
        """
        size = self.buckets.size
        table = masklets.with_room(self.table, 1, size)
        following = table.next_id
        table, rows = masklets.add(
            table, np.full(1, NONE, np.int32), np.ones(1, np.float32), frame=frame, keep_alive=0
        )
        table.ids[rows] = object_id
        clicked = table.ids[table.live & (table.phrases == NONE)]
        table.groups[rows] = clicked.min() if together else object_id
        table = masklets.clicked(table, int(rows[0]), confirmation_frames=0)
        self.table = table._replace(next_id=following)
        self.buckets.reserve(len(table.ids))
        self.buckets.add(rows, table.groups[rows])

    def mask_of(self, object_id: int, frame: int) -> Float[np.ndarray, "h w"] | None:
        """Logits that an object had on the last frame, None where it was not."""
        if self.latest is None or self.index != frame:
            return None
        output, logits, found = self.latest
        at = np.flatnonzero(output.ids == object_id)
        if not len(at):
            return None
        row = int(output.rows[at[0]])
        if row >= 0:  # as the tracker gave it, not as it is shown
            return one_of(found, row).masks
        return np.array(jax.device_get(logits)[at[0]])


def nothing_tracked(kit: Kit) -> Tracking:
    """Before the first frame."""
    rows = kit.programs.config.bucket_size
    buckets = Buckets(kit.programs, kit.engine.params)
    return Tracking(masklets.empty(rows), buckets)
