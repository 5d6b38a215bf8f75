"""Our tracking of videos as Hugging Face transformers does it; single images are ``hf_variant``'s.

transformers 5.23 departs from upstream, in the frames that follow prompts on frame 0, by these
rules; ``HfVideoPredictor`` departs alike, and ``test_hf_video.py`` holds it to transformers' own
unpatched models:

- LayerNorm eps of the ViT, geometry tokens and the clamp of presence: see ``hf_variant``. (The
  no-memory embedding does count in videos.)
- Past frames are read by their distance alone, whatever their scores.
- Logits are resized to the frame's size and from there to the memory encoder's before they become
  probabilities, or hard.
- Maps are kept in bfloat16. (So does the release, as its compute dtype; here all else is float32.)
- Prompted masks of several objects may overlap.
- Masks as prompts are cut at the frame's size, shown as +-10, remembered from that size, and give
  the pointer of the best of three masks.
- What a phrase finds first is cut at a logit of one half, at low resolution, and is a mask prompt
  of soft edges at the frame's size. The first frame is looked at once.
- Masks that others take most of are found, and capped at -10, at low resolution.
- Without a compiled kernel duplicates stay, and so do small holes and specks. (The image in which
  transformers' tests run has none: docker/transformers-all-latest-gpu in its repository.)

Not done here, because no published figure shows it: corrections, objects that are born beside
others, reconditioning, more prompted frames than are read.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch

from hf_variant import PRESENCE_CLAMP, HfSam3, hf_config
from sam3_jax.config import ModelConfig
from sam3_jax.data.resize import resize_image
from sam3_jax.inference import engine
from sam3_jax.inference.programs import RawOutput
from sam3_jax.models.tracker import Tracked
from sam3_jax.tracking import programs, state, step
from sam3_jax.tracking.concepts import shrinkage
from sam3_jax.tracking.concepts.config import ConceptConfig
from sam3_jax.tracking.concepts.shrinkage import NO_OBJECT_LOGIT, MemoryMasks
from sam3_jax.tracking.config import TrackerConfig
from sam3_jax.tracking.masks import MaskPrompt, resize
from sam3_jax.tracking.memories import frame_at
from sam3_jax.tracking.programs import Programs
from sam3_jax.video import concept_programs
from sam3_jax.video.asking import ask_masks
from sam3_jax.video.concept_programs import ConceptPrograms
from sam3_jax.video.config import VideoConfig
from sam3_jax.video.frames import Frame
from sam3_jax.video.predictor import VideoPredictor
from sam3_jax.video.reader import VideoInput, VideoSource, open_video
from sam3_jax.video.session import Session
from sam3_jax.video.timeline import Timeline

# For a prompt on frame 0 and three frames after it: no more of the past is read than there is.
FOUR_FRAMES = TrackerConfig(num_maps=3, max_conditioning=1)
SCALE = 20.0, -10.0  # logits of a mask prompt


def _with(function: Callable, module: Any, **rules: Any) -> Callable:
    """A jitted function that is traced while these names of a module mean something else."""

    @functools.wraps(function)
    def run(*args: Any, **static: Any) -> Any:
        with mock.patch.multiple(module, **rules):
            return function(*args, **static)

    return run


def _grid(model: ModelConfig) -> int:
    return model.image_size // model.vision.patch_size


def memory_masks(
    logits: jax.Array,
    prompted: jax.Array,
    group: jax.Array,
    size: tuple[int, int],
    config: TrackerConfig,
    *,
    encoder: int,
) -> jax.Array:
    """Mask logits (s, h, w) to what the memory encoder reads, ``encoder`` pixels a side."""
    logits = resize(resize(logits.astype(jnp.float32), size), (encoder, encoder))
    hard = (logits > 0).astype(jnp.float32)
    values = jnp.where(prompted[:, None, None], hard, jax.nn.sigmoid(logits))
    return values * config.mask_scale + config.mask_bias


def mask_prompt(masks: jax.Array, order: jax.Array, grid: tuple[int, int]) -> MaskPrompt:
    """Masks (s, h, w), 0 or 1, that have the frame's size already."""
    hard = masks.astype(jnp.float32)
    logits = hard * SCALE[0] + SCALE[1]
    return MaskPrompt(hard, resize(logits, (4 * grid[0], 4 * grid[1]), antialias=True))


class HfPrograms(Programs):
    """The tracker's programs."""

    def __init__(self, model: ModelConfig, config: TrackerConfig):
        with mock.patch.object(programs, "Sam3", HfSam3):
            super().__init__(model, config)
        masks = functools.partial(memory_masks, encoder=16 * _grid(model))
        for name in ("memorize", "memorize_concept", "memorize_tracked", "track"):
            setattr(self, name, _with(getattr(self, name), step, memory_masks=masks))
        self.mask_prompt = jax.jit(mask_prompt, static_argnums=2)
        empty = functools.partial(state.empty_state, config, model, dtype=jnp.bfloat16)
        self.empty_state = jax.jit(empty)


def shrunken(
    masks: jax.Array,
    suppressed: jax.Array,
    phrases: jax.Array,
    ids: jax.Array,
    *,
    shrink_ratio: float,
) -> MemoryMasks:
    """:func:`shrinkage.memory_masks` at low resolution; a phrase's only object is left alone."""
    size = masks.shape[1:]
    out = shrinkage.memory_masks(
        masks, suppressed, phrases, ids, shrink_ratio=shrink_ratio, size=size
    )
    company = ((phrases[:, None] == phrases) & (ids >= 0)).sum(axis=1) > 1
    return out._replace(capped=out.capped & company)


def encoder_masks(masks: MemoryMasks, size: tuple[int, int]) -> jax.Array:
    """:func:`shrinkage.encoder_masks`, capped first and resized then."""
    logits = masks.logits.astype(jnp.float32)
    capped = jnp.minimum(logits, NO_OBJECT_LOGIT)
    return resize(jnp.where(masks.capped[:, None, None], capped, logits), size)


def born(masks: jax.Array, chosen: jax.Array, *, size: tuple[int, int]) -> MaskPrompt:
    """Detections as mask prompts, both fields at the frame's size."""
    hard = (masks[chosen] >= 0.5) & (chosen >= 0)[:, None, None]
    soft = resize(hard.astype(jnp.float32), size, antialias=True)
    return MaskPrompt(soft, soft * SCALE[0] + SCALE[1])


class HfConceptPrograms(ConceptPrograms):
    """The programs of concept tracking."""

    def __init__(self, config: ConceptConfig, model: ModelConfig, video: tuple[int, int]):
        super().__init__(config, (_grid(model),) * 2, video)
        self._detections = self.detections
        self.detections = self._clamped
        self.for_memory = jax.jit(functools.partial(shrunken, shrink_ratio=config.shrink_ratio))
        self.bucket = _with(self.bucket, concept_programs, encoder_masks=encoder_masks)
        self.born = jax.jit(functools.partial(born, size=(model.image_size,) * 2))

    def _clamped(self, groups: Sequence[RawOutput], searched: np.ndarray) -> tuple:
        limit = PRESENCE_CLAMP
        clamped = [
            one._replace(presence_logits=jnp.clip(one.presence_logits, -limit, limit))
            for one in groups
        ]
        return self._detections(tuple(clamped), searched)


class HfVideoPredictor(VideoPredictor):
    """Float32 predictor with all of the departures; see the module."""

    def __init__(self, params: dict, config: ModelConfig, video: VideoConfig):
        """``video``: thresholds and sizes; the rules above replace what contradicts them."""
        tracker = dataclasses.replace(
            video.tracker, selection="none", non_overlapping_prompts=False
        )
        concepts = dataclasses.replace(video.concepts, nms_overlap=0.0, clean_area=0)
        video = dataclasses.replace(video, tracker=tracker, concepts=concepts, repeat_first=False)
        with mock.patch.object(engine, "Sam3", HfSam3):
            super().__init__(params, hf_config(config), dtype="float32", video=video)
        self._programs = HfPrograms(self.engine.config, self.video.tracker)

    def start(self, video: VideoInput, *, resize: Callable = resize_image) -> Session:
        """A session whose results come at once. ``resize``: as ``resize_image``."""
        session = super().start(video, delay=0)
        side = self.engine.config.image_size

        def small(frame: Frame) -> Frame:
            return frame._replace(image=resize(frame.image, (side, side)))

        session._timeline.features._small = small
        return session

    def _timeline(self, video: VideoInput, fps: Any) -> Timeline:
        source: VideoSource = open_video(video, fps=fps)
        if source.size not in self._concepts:
            made = HfConceptPrograms(self.video.concepts, self.engine.config, source.size)
            self._concepts[source.size] = made
        return super()._timeline(source, fps)


def resize_as_on_cuda(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """What torchvision makes of (h, w, 3) bytes on CUDA, where it rounds once, but for ties."""
    pixels = torch.from_numpy(image).movedim(-1, 0)[None].float()
    large = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)
    return large.round()[0].movedim(0, -1).to(torch.uint8).contiguous().numpy()


def add_mask_logits(session: Session, frame: int, logits: np.ndarray) -> int:
    """A new object by a mask as transformers' tests give it: as logits (h, w) at the video's size.

    Give it after all other prompts: those would have the frame remembered once more.
    """
    timeline = session._timeline
    kit, buckets = timeline.kit, timeline.tracking.buckets
    size = (kit.model.image_size,) * 2
    hard = np.asarray(resize(jnp.asarray(logits)[None], size, antialias=True)[0] >= 0.5)
    object_id = timeline.add_clicked(frame)
    levels = timeline.features.tracker(frame)
    given = ask_masks(kit._replace(size=size), levels, {object_id: hard}, buckets.grid)[object_id]
    timeline.edits.put(frame, object_id, given)
    timeline.changed(frame)
    timeline.apply_edits()
    # Remembered once more, from the large mask; a session keeps the small one.
    large = given._replace(masks=hard * np.float32(SCALE[0]) + np.float32(SCALE[1]))
    bucket, slot = divmod(timeline.tracking.table.row_of(object_id), buckets.size)
    everywhere = Tracked(*(np.stack([value] * buckets.size) for value in large))
    write = np.arange(buckets.size) == slot
    now = frame_at(frame, timeline.features.total)
    buckets.prompt(levels, now, {bucket: everywhere}, {bucket: write})
    return object_id


def video_logits(session: Session, object_id: int, frame: int) -> np.ndarray:
    """Mask logits (h, w) at the video's size, of the frame that was tracked last, uncleaned."""
    timeline = session._timeline
    edit = timeline.edits.get(frame, object_id)
    known = timeline.tracking.mask_of(object_id, frame) if edit is None else edit.found.masks
    return np.asarray(resize(jnp.asarray(known, jnp.float32)[None], timeline.kit.size)[0])
