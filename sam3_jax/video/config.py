"""Configuration of a session: the tracker's, the heuristics', and what is kept for going back."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from sam3_jax.tracking import config as trackers
from sam3_jax.tracking.concepts import config as concepts
from sam3_jax.tracking.concepts.config import ConceptConfig
from sam3_jax.tracking.config import TrackerConfig


def _own_concepts() -> ConceptConfig:
    return ConceptConfig(recondition_together=False)


@dataclass
class VideoConfig:
    """By default objects do not depend on company, but for rounding; in :func:`sam3`, which is as
    released, they do.

    ``repeat_first``: the first frame of a pass with phrases is looked at twice, as upstream, which
    runs it once for the prompt and once more when it propagates: the first memory of what is found
    there is then the tracker's own mask.
    ``snapshot_every``, ``snapshot_bytes``: the state is copied to the host every so many frames;
    where the copies would take more than so many bytes every other one goes and the distance
    doubles. Going back computes anew from the copy before.
    ``encode_ahead``: frames that the backbone takes together; 0: 8 on each accelerator, 1 on each
    CPU device. On a mesh every device takes its share of them, if they can be shared out evenly.
    Streams are encoded one by one in any case.
    """

    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    concepts: ConceptConfig = field(default_factory=_own_concepts)
    repeat_first: bool = True
    snapshot_every: int = 30
    snapshot_bytes: int = 1 << 30
    encode_ahead: int = 0


def sam3() -> VideoConfig:
    """The released SAM 3: memory is selected, and renewed, for objects that were born together."""
    return VideoConfig(trackers.sam3(), concepts.sam3())


def sam3_1() -> VideoConfig:
    """SAM 3.1's rules for phrases, on the tracker that this is."""
    rules = dataclasses.replace(concepts.sam3_1(), recondition_together=False)
    return VideoConfig(TrackerConfig(), rules)


NAMED = {"default": VideoConfig, "sam3": sam3, "sam3.1": sam3_1}


def checked(config: VideoConfig, trained_maps: int) -> VideoConfig:
    """The configuration with one size of bucket, the tracker's.

    Raises:
      ValueError: naming the field, its value and what it may be.
    """
    trackers.check(config.tracker, trained_maps)
    size = config.tracker.bucket_size
    config = dataclasses.replace(
        config, concepts=dataclasses.replace(config.concepts, bucket_size=size)
    )
    concepts.check(config.concepts)
    for name, least in (("snapshot_every", 1), ("snapshot_bytes", 0), ("encode_ahead", 0)):
        if getattr(config, name) < least:
            raise ValueError(f"{name}={getattr(config, name)}: must be at least {least}")
    return config
