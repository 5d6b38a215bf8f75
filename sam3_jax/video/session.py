"""What a user does with one video: say what to follow, look at it frame by frame, correct it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from sam3_jax.inference.prompts import Values
from sam3_jax.tracking.concepts.masklets import NONE
from sam3_jax.tracking.concepts.outputs import output_delay, release
from sam3_jax.video import saving
from sam3_jax.video.asking import ask_clicks, ask_masks, check_mask, packed, unpacked
from sam3_jax.video.display import VideoFrame, show
from sam3_jax.video.frames import VideoError
from sam3_jax.video.phrases import Phrase
from sam3_jax.video.reader import VideoSource
from sam3_jax.video.timeline import Timeline


class Session:
    """One video and all that is said about it; made by ``VideoPredictor.start``.

    >>> session = predictor.start("clip.mp4")
    >>> session.add_text("red car")
    >>> for frame in session.propagate():
    ...     print(frame.index, frame.ids, frame.masks.shape)

    Not for several threads at a time. Points, boxes and masks are pixels of the video.
    """

    def __init__(self, timeline: Timeline, *, delay: int | None = None):
        """``delay``: see :meth:`VideoPredictor.start`."""
        if delay is not None and delay < 0:
            raise ValueError(f"delay must be 0 frames or more, got {delay}")
        self._timeline = timeline
        self._delay = delay

    # ------------------------------------------------------------------ prompts

    def add_text(
        self,
        phrase: str | None,
        boxes: Values | None = None,
        labels: Values | None = None,
        frame: int | None = None,
    ) -> None:
        """Looks for everything that a phrase names, from the next pass on.

        A session may have several phrases; identities are independent. Called again with the same
        phrase it adds exemplars, or replaces those of the same frame. What was tracked is forgotten
        with all corrections of what phrases had found, and found with new numbers by the next pass,
        which begins at the start of the video; in a stream the phrase joins at the next frame.

        Args:
          phrase: a noun phrase; None: what the boxes show, found on their frame and then tracked.
          boxes: exemplars (n, 4) as (x0, y0, x1, y1) on frame ``frame``, which say there what is
            meant (``labels`` 1, the default) and what is not (0).
          frame: of the boxes.

        Raises:
          PromptError: on a prompt that cannot be used.
          VideoError: when there is no such frame.
          RuntimeError: when the checkpoint lacks the detector's weights.
        """
        timeline = self._timeline
        timeline.kit.engine.require("decoder", part="image")
        if (boxes is None) != (frame is None):
            raise ValueError("boxes are exemplars on a frame: give both boxes and frame, or none")
        exemplars = {}
        if frame is not None:
            self._check_frame(frame)
            exemplars[frame] = (np.asarray(boxes, np.float32), labels)
        new = Phrase(phrase, exemplars)
        new.check(timeline.kit.size)
        known = [p for p in timeline.phrases if phrase is not None and p.text == phrase]
        if known:
            known[0].exemplars.update(exemplars)
            timeline.phrases_changed()
        else:
            timeline.add_phrase(new)

    def add_points(
        self,
        frame: int,
        points: Values,
        labels: Values | None = None,
        object_id: int | None = None,
        *,
        box: Values | None = None,
    ) -> int:
        """Points at an object on any frame: a new one, or one that is to be corrected.

        A correction starts from the mask that the object has on that frame; points given there
        before are replaced. Then propagate again, from that frame on, or backwards.

        Args:
          points: (n, 2) as (x, y); of more than 16, the corners of a box among them, the first and
            the last 8 count, as upstream.
          labels: 1 on the object (default), 0 not on it.
          object_id: None: a new object.
          box: (x0, y0, x1, y1) around the object, besides.

        Returns:
          the object's identity.

        Raises:
          PromptError: on values that cannot be used.
          KeyError: for an object that is not tracked on that frame.
          VideoError: when the frame does not exist, is gone or cannot be read.
        """
        return self._click(frame, object_id, points, labels, box)

    def add_box(self, frame: int, box: Values, object_id: int | None = None) -> int:
        """Draws a box (x0, y0, x1, y1) around an object; see :meth:`add_points`."""
        return self._click(frame, object_id, None, None, box)

    def add_mask(self, frame: int, mask: np.ndarray, object_id: int | None = None) -> int:
        """Shows an object by its mask, (height, width) of bool at the video's size.

        On one frame a later mask takes its pixels from earlier ones. See :meth:`add_points`.
        """
        timeline = self._timeline
        given = check_mask(mask, timeline.kit.size)
        object_id = self._prepare(frame, object_id)
        levels = timeline.features.tracker(frame)
        if object_id is None:
            object_id = timeline.add_clicked(frame)
        size = timeline.kit.size
        masks = {
            e.object_id: unpacked(e, size)
            for e in timeline.edits.on(frame)
            if e.mask is not None and e.object_id != object_id
        }
        masks[object_id] = given
        found = ask_masks(timeline.kit, levels, masks, timeline.tracking.buckets.grid)
        for name, one in found.items():
            timeline.edits.put(frame, name, one, packed(masks[name]))
        timeline.changed(frame)
        return object_id

    def remove(self, object_id: int) -> None:
        """Takes an object out, on all frames. Its identity is not used again.

        What a phrase found stays away: it is followed on, unseen, so that it is not found anew.

        Raises:
          KeyError: for an unknown one, or one that was removed before.
        """
        timeline = self._timeline
        if object_id not in timeline.clicked:
            timeline.row_of(object_id)
        timeline.remove(object_id)

    # ------------------------------------------------------------------ results

    def propagate(
        self,
        start: int | None = None,
        stop: int | None = None,
        *,
        backward: bool = False,
        exclusive: bool = False,
    ) -> Iterator[VideoFrame]:
        """Follows everything through the video.

        Args:
          start: first frame. None: of phrases the video's first (backward: the last); without
            phrases the first frame with a prompt (backward: the last one with a prompt); of a
            stream the next.
          stop: the frame to stop before; None: the end (backward: frame 0 is the last).
          backward: towards frame 0.
          exclusive: no two objects share a pixel, the one that is surest of it has it. Otherwise
            so it is among the objects of a phrase only, where the one with the better score on the
            frame has it.

        Yields:
          every frame, in order, one that cannot be read with its error and without objects. With
          phrases frames come ``delay`` frames late, and all of them by the end. A pass that was
          left goes on from ``position + 1`` with the frames that were waiting.

        Raises:
          ValueError: when nothing was asked for yet.
          VideoError: when frame ``start`` does not exist or is gone; in the middle of a pass, when
            a correction has taken the session back to another frame.
        """
        timeline = self._timeline
        features = timeline.features
        if not timeline.phrases and not list(timeline.edits):
            raise ValueError(
                "there is nothing to follow: give the session a phrase (add_text) or an object "
                "(add_points, add_box, add_mask) first"
            )
        if backward and features.total is None:
            raise VideoError(
                f"{features.video.name}: a stream cannot be followed backwards; record it to a file"
            )
        if start is None:
            start = self._default_start(backward=backward)
        if features.total is not None:
            self._check_frame(start)
        return self._propagate(start, stop, backward=backward, exclusive=exclusive)

    def _propagate(
        self, start: int, stop: int | None, *, backward: bool, exclusive: bool
    ) -> Iterator[VideoFrame]:
        timeline = self._timeline
        timeline.go_to(start, backward=backward)
        moves, given = timeline.moves, timeline.edits.given
        for encoded in timeline.features.frames(start, stop, backward=backward):
            self._check_pass(moves)
            if timeline.edits.given != given:  # of the frame that was just shown
                given = timeline.edits.given
                timeline.apply_edits()
            timeline.waiting.append(timeline.step(encoded))
            yield from self._due(moves, finished=False, exclusive=exclusive)
        yield from self._due(moves, finished=True, exclusive=exclusive)

    def _check_pass(self, moves: int) -> None:
        if self._timeline.moves != moves:
            raise VideoError(
                f"{self.video.name}: the session has gone to another frame since this pass began, "
                "as a correction does: leave the pass and propagate() from the corrected frame"
            )

    def _due(self, moves: int, *, finished: bool, exclusive: bool) -> Iterator[VideoFrame]:
        """Frames that need not wait any longer; each stops waiting when it is shown."""
        timeline = self._timeline
        outputs = [seen.output for seen in timeline.waiting]
        due = release(
            timeline.kit.config.concepts, outputs, delay=self.delay + 1, finished=finished
        )
        for _, shown in due:
            self._check_pass(moves)
            seen = timeline.waiting.pop(0)
            yield show(seen, shown, self.phrases, timeline.kit.size, exclusive=exclusive)

    @property
    def delay(self) -> int:
        """Frames that have to follow one before it is shown: hotstart's or what was chosen."""
        if not self._timeline.phrases:
            return 0
        least = output_delay(self._timeline.kit.config.concepts) - 1
        return least if self._delay is None else min(self._delay, least)

    # ------------------------------------------------------------------ facts

    @property
    def video(self) -> VideoSource:
        """The video."""
        return self._timeline.features.video

    @property
    def phrases(self) -> tuple[str, ...]:
        """What is looked for; "visual" for boxes without a phrase."""
        return tuple(phrase.name for phrase in self._timeline.phrases)

    @property
    def position(self) -> int | None:
        """The frame that was tracked last, None before the first."""
        return self._timeline.tracking.index

    @property
    def objects(self) -> dict[int, str]:
        """Identities that are tracked now, with their phrases; "" for objects of a user's."""
        tracking, phrases = self._timeline.tracking, self._timeline.phrases
        table = tracking.table
        rows = [r for r in tracking.order if table.ids[r] not in self._timeline.dropped]
        numbers = [(int(table.ids[r]), int(table.phrases[r])) for r in rows]
        return {i: phrases[p].name if p != NONE else "" for i, p in numbers}

    @property
    def state_bytes(self) -> int:
        """Of the memory of objects on the device: grows with the most objects at a time only."""
        return self._timeline.tracking.buckets.bytes

    @property
    def snapshot_bytes(self) -> int:
        """Of the copies on the host that corrections go back to."""
        return self._timeline.snapshots.bytes

    def save(self, path: str | os.PathLike) -> None:
        """Writes what is tracked and all prompts; see :mod:`~sam3_jax.video.saving`."""
        saving.save(self._timeline, path)

    # ------------------------------------------------------------------ inside

    def _click(
        self,
        frame: int,
        object_id: int | None,
        points: Values | None,
        labels: Values | None,
        box: Values | None,
    ) -> int:
        timeline = self._timeline
        object_id = self._prepare(frame, object_id)
        previous = None
        if object_id is not None:
            edit = timeline.edits.get(frame, object_id)
            known = timeline.tracking.mask_of(object_id, frame)
            previous = known if edit is None else edit.found.masks
        levels = timeline.features.tracker(frame)
        found = ask_clicks(timeline.kit, levels, points, labels, box, previous)
        if object_id is None:
            object_id = timeline.add_clicked(frame)
        timeline.edits.put(frame, object_id, found)
        timeline.changed(frame)
        return object_id

    def _prepare(self, frame: int, object_id: int | None) -> int | None:
        """Goes to where an object can be corrected."""
        timeline = self._timeline
        timeline.kit.engine.require("tracker", part="tracker")
        self._check_frame(frame)
        if object_id is not None:
            if object_id not in timeline.clicked:
                timeline.row_of(object_id)
            timeline.at(frame)
            timeline.row_of(object_id)
        return object_id

    def _check_frame(self, frame: int) -> None:
        self._timeline.features.check(frame)

    def _default_start(self, *, backward: bool) -> int:
        timeline = self._timeline
        total = timeline.features.total
        if total is None:
            return 0 if timeline.tracking.index is None else timeline.tracking.index + 1
        if timeline.phrases:
            return total - 1 if backward else 0
        frames = timeline.edits.frames
        return frames[-1] if backward else frames[0]
