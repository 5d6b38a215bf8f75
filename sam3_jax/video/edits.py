"""What a user said about objects, as it is applied again whenever a pass is repeated."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from sam3_jax.models.tracker import Tracked


class Edit(NamedTuple):
    """A prompt for one object on one frame, and what the model made of it.

    ``found`` is one row, on the host. ``mask``: the bits of a mask prompt at the video's size,
    which a later mask on that frame needs to know. ``serial`` numbers edits; one that changes gets
    a new number, so that states know whether they have it.
    """

    serial: int
    frame: int
    object_id: int
    found: Tracked
    mask: UInt8[np.ndarray, " bytes"] | None = None


class Edits:
    """All prompts of a session; of each object at most one on each frame counts, the last."""

    def __init__(self, edits: tuple[Edit, ...] = ()):
        self._by: dict[tuple[int, int], Edit] = {(e.frame, e.object_id): e for e in edits}
        self._next = max((e.serial for e in edits), default=-1) + 1

    def __iter__(self):
        """In the order in which they were given."""
        return iter(sorted(self._by.values(), key=lambda edit: edit.serial))

    def put(
        self, frame: int, object_id: int, found: Tracked, mask: np.ndarray | None = None
    ) -> None:
        """Adds one, or replaces that of the same object on the same frame."""
        self._by[frame, object_id] = Edit(self._next, frame, object_id, found, mask)
        self._next += 1

    def get(self, frame: int, object_id: int) -> Edit | None:
        """That of an object on a frame."""
        return self._by.get((frame, object_id))

    @property
    def given(self) -> int:
        """How many there have ever been."""
        return self._next

    def on(self, frame: int) -> list[Edit]:
        """Those of a frame, in their order."""
        return [edit for edit in self if edit.frame == frame]

    def drop(self, object_id: int) -> None:
        """Forgets all of an object."""
        self._by = {key: edit for key, edit in self._by.items() if key[1] != object_id}

    @property
    def frames(self) -> list[int]:
        """Frames that have some."""
        return sorted({edit.frame for edit in self._by.values()})
