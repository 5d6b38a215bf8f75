"""Long videos: 2000 frames with 200 objects that come and go take the memory of 200 frames."""

from __future__ import annotations

import ctypes
import itertools
import platform

import jax
import numpy as np
import psutil
import pytest

import tiny_predictor
import video_session
from sam3_jax.tracking.config import TrackerConfig
from sam3_jax.video.config import VideoConfig
from sam3_jax.video.predictor import VideoPredictor
from sam3_jax.video.session import Session

pytestmark = pytest.mark.optimised

FRAMES, OBJECTS, AT_A_TIME = 2000, 200, 14
STEP = FRAMES // OBJECTS
WARM = 400  # until all programs are compiled, and snapshots as many as they may be
RULES = VideoConfig(
    TrackerConfig(bucket_size=4), video_session.CONCEPTS, snapshot_every=10, snapshot_bytes=4 << 20
)


@pytest.fixture(scope="module")
def predictor() -> VideoPredictor:
    made = video_session.params(), tiny_predictor.config()
    predictor = VideoPredictor(*made, dtype="float32", video=RULES)
    predictor.warm_up()
    return predictor


class Watch:
    """What a session takes after every few frames, and what was compiled once it was warm."""

    def __init__(self, session: Session, warm: int):
        self.session, self.warm = session, warm
        self.compiled: list[str] = []
        self.rows: list[tuple[int, int, int]] = []
        self._warm = False
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, name: str, *_, **__) -> None:
        if self._warm and "backend_compile" in name:
            self.compiled.append(name)

    def look(self, frame: int) -> None:
        assert self.session.snapshot_bytes <= RULES.snapshot_bytes
        self._warm = frame >= self.warm
        if self._warm:
            live = sum(a.nbytes for a in jax.live_arrays())
            resident = resident_bytes()
            self.rows.append((live, resident, self.session.state_bytes))

    def check(self, objects: int, grown: int) -> None:
        """``grown``: resident bytes by which the second half may be above the first."""
        self._warm = False
        jax.monitoring.unregister_event_duration_listener(self._note)
        live, resident, state = (np.asarray(column) for column in zip(*self.rows, strict=True))
        assert self.compiled == []
        assert set(state.tolist()) == {predictor_bytes(self.session, objects)}
        # Prompted frames' pyramids and frames that wait differ by a frame or two.
        assert live.max() < 1.1 * live.min(), (live.min(), live.max())
        half = len(resident) // 2
        more = np.median(resident[half:]) - np.median(resident[:half])
        assert more < grown, f"{more / 2**20:.1f} MiB more in the second half"


def resident_bytes() -> int:
    """Of this process, but for the holes that glibc keeps: they take 1000 frames to settle."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss


def predictor_bytes(session: Session, objects: int) -> int:
    """What is stated of so many objects at a time."""
    kit = session._timeline.kit
    return VideoPredictor.from_engine(kit.engine, video=kit.config).state_bytes(objects).session


@pytest.mark.slow
def test_clicked_objects_come_and_go(predictor):
    """In a video that can be gone back in, so snapshots are taken, thinned and dropped."""
    clip = video_session.clip()
    video = np.tile(clip, (FRAMES // len(clip), 1, 1, 1))
    session = predictor.start(video)
    watch, places = Watch(session, WARM), np.random.default_rng(0)
    ids: list[int] = []
    seen: set[int] = set()
    for start in range(0, FRAMES, STEP):
        ids.append(session.add_points(start, places.uniform((2, 2), (78, 62), (1, 2))))
        if len(ids) > AT_A_TIME:
            session.remove(ids.pop(0))
        if start % 1000 == 290:  # a correction in the past
            session.add_points(start - 5, [[30, 30]], object_id=ids[0])
            for _ in session.propagate(start - 5, start):
                pass
        for frame in session.propagate(start, start + STEP):
            seen |= set(frame.ids.tolist())
        watch.look(start)
    # A fifth of what it would be if a frame left one pyramid (50 KB) behind.
    watch.check(AT_A_TIME + 1, grown=8 << 20)
    assert len(seen) == OBJECTS
    assert len(session.objects) == AT_A_TIME


@pytest.mark.slow
def test_a_phrase_and_clicks_in_a_stream_without_end(predictor):
    """A camera: clicked objects come and go beside found ones; a found one goes and stays away."""
    session = predictor.start(itertools.cycle(video_session.clip()))
    most = RULES.concepts.max_objects
    for i in range(most):  # room for all of them, so that the session is as large as it can be
        session.add_points(0, [[4 * i + 3, 20]])
    for i in range(most):
        session.remove(i)
    session.add_text("cat")
    watch, seen, places = Watch(session, 200), set(), np.random.default_rng(0)
    ids: list[int] = []
    removed = None
    for frame in itertools.islice(session.propagate(), 1000):
        seen |= set(frame.ids.tolist())
        if frame.index % STEP == 0:
            watch.look(frame.index)
            ids.append(
                session.add_points(session.position, places.uniform((2, 2), (78, 62), (1, 2)))
            )
            if len(ids) > 4:
                session.remove(ids.pop(0))
            found = [i for i, phrase in session.objects.items() if phrase]
            if removed is None and found:
                removed = found[0]
                session.remove(removed)
        elif removed is not None:
            assert removed not in frame.ids
    # It comes and goes by 10 MiB; with a pyramid left behind a frame it would be 20.
    watch.check(most, grown=14 << 20)
    assert removed is not None
    assert len(seen) > 20
