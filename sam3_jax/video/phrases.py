"""What a session looks for by concept, and where in a frame a detector finds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sam3_jax.inference.engine import PROMPT_BUCKETS
from sam3_jax.inference.programs import RawOutput
from sam3_jax.inference.prompts import Prompt, bucket, pad_geometry, phrase_of
from sam3_jax.video.tracked import Kit


@dataclass
class Phrase:
    """A phrase, for all frames, with exemplar boxes on some; or boxes alone, for their frames."""

    text: str | None
    exemplars: dict[int, tuple[Any, Any]] = field(default_factory=dict)  # frame: boxes, labels

    def prompt(self, frame: int) -> Prompt | None:
        """What is to be found on a frame; None: nothing is looked for."""
        boxes, labels = self.exemplars.get(frame, ((), None))
        if self.text is None and frame not in self.exemplars:
            return None
        return Prompt(self.text, boxes, labels)

    @property
    def name(self) -> str:
        """As results call it."""
        return self.text or "visual"

    def check(self, size: tuple[int, int]) -> None:
        """Raises a PromptError for what cannot be used on a video of this size."""
        for frame in [*self.exemplars] or [0]:
            prompt = self.prompt(frame)
            phrase_of(prompt or Prompt())
            pad_geometry([prompt], [size])


class Found(NamedTuple):
    """Queries of all phrases on a frame."""

    scores: Float[Array, " d"]
    kept: Bool[Array, " d"]
    masks: Float[Array, "d h w"]
    phrases: Int[np.ndarray, " d"]
    unsearched: tuple[int, ...]


def detect(kit: Kit, trunk: Array, phrases: list[Phrase], index: int) -> Found:
    """Grounds all phrases on a frame, four at a time.

    Shapes depend on the number of phrases alone.
    """
    engine = kit.engine
    levels = engine.run.detector_levels(engine.params, trunk)
    prompts = [phrase.prompt(index) for phrase in phrases]
    groups, searched, numbers = [], [], []
    for start in range(0, len(prompts), PROMPT_BUCKETS[-1]):
        asked = prompts[start : start + PROMPT_BUCKETS[-1]]
        length = bucket(len(asked), PROMPT_BUCKETS)
        there = [prompt is not None for prompt in asked]
        if any(there):
            filled = [prompt or Prompt("visual") for prompt in asked]
            groups.append(engine.ground_one(levels, filled, kit.size))
        else:
            groups.append(_nothing(kit, length))
        searched += [*there, *[False] * (length - len(asked))]
        numbers += range(start, start + length)
    found = kit.concepts.detections(tuple(groups), np.asarray(searched))
    queries = kit.model.decoder.num_queries
    unsearched = tuple(i for i, prompt in enumerate(prompts) if prompt is None)
    return Found(*found, np.repeat(np.asarray(numbers, np.int32), queries), unsearched)


def _nothing(kit: Kit, count: int) -> RawOutput:
    """The output for phrases that nobody looks for."""
    side, queries = kit.engine.mask_side, kit.model.decoder.num_queries
    shapes = [(queries,), (queries, 4), (), (queries, side, side), (side, side)]
    return RawOutput(*(jax.device_put(np.zeros((count, *s), np.float32)) for s in shapes))
