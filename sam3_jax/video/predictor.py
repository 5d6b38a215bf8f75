"""Videos: what :class:`~sam3_jax.inference.image.ImagePredictor` is for images."""

from __future__ import annotations

import itertools
import os
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sam3_jax.config import ModelConfig
from sam3_jax.inference.engine import Engine
from sam3_jax.tracking.memories import frame_at
from sam3_jax.tracking.programs import Programs
from sam3_jax.tracking.state import StateBytes, state_bytes
from sam3_jax.video import saving
from sam3_jax.video.concept_programs import ConceptPrograms
from sam3_jax.video.config import NAMED, VideoConfig, checked
from sam3_jax.video.features import Features
from sam3_jax.video.reader import VideoInput, open_video
from sam3_jax.video.session import Session
from sam3_jax.video.timeline import Timeline
from sam3_jax.video.tracked import Kit


class VideoPredictor:
    """The model on its device with the programs of tracking; sessions share them.

    >>> predictor = VideoPredictor.from_pretrained("sam3_jax_ckpt")
    >>> session = predictor.start("clip.mp4")
    """

    def __init__(
        self,
        params: dict,
        config: ModelConfig,
        *,
        dtype: Any = "auto",
        resolution: int | None = None,
        video: VideoConfig | str = "default",
        mesh: Mesh | None = None,
    ):
        """Wraps parameters that are in memory already.

        Args:
          params, config, dtype, resolution: as for :class:`~sam3_jax.ImagePredictor`.
          video: rules of tracking, or the name of a preset: "default", "sam3", "sam3.1".
          mesh: several devices (``sam3_jax.sharding.make_mesh()``: all) that share the objects of
            a session, and its frames where these are encoded ahead; their number must divide
            ``TrackerConfig.bucket_size``.

        Raises:
          ValueError: on values that cannot work.
        """
        self._use(Engine(params, config, dtype=dtype, mesh=mesh, resolution=resolution), video)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        dtype: Any = "auto",
        *,
        resolution: int | None = None,
        video: VideoConfig | str = "default",
        mesh: Mesh | None = None,
    ) -> VideoPredictor:
        """Loads a converted checkpoint; see :meth:`sam3_jax.ImagePredictor.from_pretrained`."""
        engine = Engine.from_pretrained(path, dtype=dtype, mesh=mesh, resolution=resolution)
        return cls.from_engine(engine, video=video)

    @classmethod
    def from_engine(cls, engine: Engine, *, video: VideoConfig | str = "default") -> VideoPredictor:
        """A predictor that shares parameters, programs and devices with one of images."""
        predictor = cls.__new__(cls)
        predictor._use(engine, video)
        return predictor

    def _use(self, engine: Engine, video: VideoConfig | str) -> None:
        if isinstance(video, str):
            if video not in NAMED:
                raise ValueError(f"video must be one of {', '.join(NAMED)}, got {video!r}")
            video = NAMED[video]()
        engine.require("tracker/memory_encoder", part="tracker")
        self.engine = engine
        self.video = checked(video, engine.config.memory.num_maps)
        self._programs = Programs(
            engine.config, self.video.tracker, dtype=engine.dtype, mesh=engine.mesh
        )
        self._concepts: dict[tuple[int, int], ConceptPrograms] = {}

    def start(
        self,
        video: VideoInput,
        *,
        delay: int | None = None,
        fps: int | float | Fraction | None = None,
    ) -> Session:
        """Opens a video.

        Args:
          video: a file, a folder of pictures, a (frames, height, width, 3) uint8 array, a list or
            any iterator of pictures, which may be endless.
          delay: frames that results of phrases wait, at most; None: hotstart's (14), so that an
            object that turns out to be none is never shown; 0: results come at once.
          fps: frames a second of what is no file.

        Raises:
          VideoError: on a video that cannot be used.
        """
        return Session(self._timeline(video, fps), delay=delay)

    def restore(
        self,
        path: str | os.PathLike,
        video: VideoInput,
        *,
        delay: int | None = None,
        fps: int | float | Fraction | None = None,
    ) -> Session:
        """Goes on with a session that was saved, on the same video.

        Raises:
          SessionError: when the file is none, or of another video, model or rules.
        """
        timeline = self._timeline(video, fps)
        saving.restore(timeline, path)
        return Session(timeline, delay=delay)

    def warm_up(self) -> None:
        """Compiles what tracking may need later, so that a stream never waits for it.

        The programs of a bucket for few objects and for all, with one prompted frame of each object
        and with more. What depends on a video's size and on phrases is compiled by the first frame,
        and one program by the first frame that has prompts for objects in several buckets.
        """
        engine, programs = self.engine, self._programs
        side = engine.config.image_size
        blank = open_video(np.zeros((1, side, side, 3), np.uint8))
        levels = Features(engine, blank, 1).tracker(0)
        none = np.zeros(self.video.tracker.bucket_size, bool)
        grid = side // engine.config.vision.patch_size
        large = jnp.zeros((len(none), 16 * grid, 16 * grid))  # as phrases' masks are remembered
        given, rest = (levels, frame_at(0)), (none, none, none, None)
        for slots, reads in itertools.product(programs.widths, programs.reads):
            least, state = {"slots": slots, "reads": reads}, programs.empty_state()
            found = programs.propagate(engine.params, state, *given, **least)
            for remember, masks in (
                (programs.memorize, found.masks),
                (programs.memorize_concept, large),
            ):
                here = programs.place(found._replace(masks=masks))
                state = remember(engine.params, state, *given, here, *rest, slots=slots)
            jax.block_until_ready(programs.track(engine.params, state, *given, **least))

    def state_bytes(self, objects: int = 1) -> StateBytes:
        """What memory of so many objects takes, however long a video is."""
        engine = self.engine
        return state_bytes(self.video.tracker, engine.config, dtype=engine.dtype, objects=objects)

    def _timeline(self, video: VideoInput, fps: int | float | Fraction | None) -> Timeline:
        source = open_video(video, fps=fps)
        engine = self.engine
        if source.size not in self._concepts:
            side = engine.config.image_size // engine.config.vision.patch_size
            programs = ConceptPrograms(self.video.concepts, (side, side), source.size, engine.mesh)
            self._concepts[source.size] = programs
        kit = Kit(engine, self._programs, self._concepts[source.size], self.video, source.size)
        ahead = self.video.encode_ahead or engine.default_batch_size
        return Timeline(kit, Features(engine, source, ahead))
