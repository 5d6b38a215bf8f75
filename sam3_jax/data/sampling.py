"""Which phrases are asked about a picture, and with which exemplar boxes.

Upstream: ``sam3/train/transforms/filter_query_transforms.py`` (crowds, visual prompts, too many
targets) and ``point_sampling.py`` (noise of boxes). All functions take a numpy generator.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sam3_jax.data.augment import is_sided
from sam3_jax.data.records import Instance
from sam3_jax.data.scenes import Pair, Scene, Vocabulary
from sam3_jax.tokenizer import clean

VISUAL = "visual"  # the phrase of a prompt that is only boxes


@dataclass
class SamplingConfig:
    """Prompts of a picture. The defaults: phrases alone, as in the released fine-tuning."""

    phrases: int = 4  # prompts an image; a picture with fewer is filled with invalid ones
    negatives: float = 0.5  # of these, the share kept for phrases that are not in the picture
    hard: float = 0.5  # of the negatives, the share drawn among those like a phrase that is
    max_targets: int = 200  # phrases with more are dropped
    visual: float = 0.0  # share of the phrases replaced by exemplar boxes; the paper's .2
    visual_phrases: str = ""  # only phrases that match (a regular expression) are replaced
    boxes: float = 0.0  # share of the others that get exemplar boxes besides; the paper's .2
    max_exemplars: int = 1  # positive boxes of a prompt
    negative_exemplars: float = 0.0  # chance of a further box, around another phrase's target
    box_noise: float = 0.1  # standard deviation, as a share of the side
    box_noise_max: float = 20.0  # pixels of the picture


class Candidate(NamedTuple):
    """A phrase that may be asked about the pictures of a mosaic, or about one."""

    phrase: str
    pair_id: str
    targets: tuple[tuple[int, Instance], ...]  # (number of the picture, instance)
    crowds: tuple[tuple[int, Instance], ...]  # regions of the concept that are no targets
    exhaustive: bool


def candidates(
    scenes: Sequence[Scene], vocabulary: Vocabulary, max_targets: int
) -> tuple[list[Candidate], list[Candidate]]:
    """All phrases with targets, and all that are certainly in none of the pictures.

    Several pictures (a mosaic) share a phrase only if each says what it shows of it. Phrases with
    too many targets, of which only crowds are known, or whose only instances were damaged, are in
    neither list.
    """
    by_name = [{clean(pair.phrase): pair for pair in scene.pairs} for scene in scenes]
    positive, negative, known = [], [], set()
    for name in dict.fromkeys(name for pairs in by_name for name in pairs):
        known.add(name)
        found = [pairs.get(name) for pairs in by_name]
        if None in found and not vocabulary.closed:
            continue
        candidate = _join(found)
        if len(scenes) > 1 and is_sided([candidate.phrase]):
            continue  # a mosaic's left is not that of its pictures
        if candidate.targets and len(candidate.targets) <= max_targets:
            positive.append(candidate)
        elif not candidate.targets and candidate.exhaustive:
            negative.append(candidate)
    if vocabulary.closed:
        for phrase in vocabulary.phrases:
            if clean(phrase) not in known:
                negative.append(Candidate(phrase, "", (), (), True))
    return positive, negative


def choose(
    positive: Sequence[Candidate],
    negative: Sequence[Candidate],
    vocabulary: Vocabulary,
    config: SamplingConfig,
    rng: np.random.Generator,
) -> list[Candidate]:
    """At most ``config.phrases`` of them in random order.

    Slots that one kind cannot fill go to the other.
    """
    kept = int(rng.binomial(config.phrases, config.negatives))
    num_negative = min(len(negative), max(kept, config.phrases - len(positive)))
    num_positive = min(len(positive), config.phrases - num_negative)
    chosen = _draw(positive, num_positive, rng)
    hard = vocabulary.hard(c.phrase for c in positive) if num_negative else frozenset()
    like = [c for c in negative if c.phrase in hard]
    num_hard = min(len(like), int(rng.binomial(num_negative, config.hard)))
    picked = _draw(like, num_hard, rng)
    names = {c.phrase for c in picked}
    rest = [c for c in negative if c.phrase not in names]
    chosen += picked + _draw(rest, num_negative - num_hard, rng)
    return _draw(chosen, len(chosen), rng)


def noisy_box(
    box: Float[np.ndarray, " 4"],
    size: tuple[int, int],
    config: SamplingConfig,
    rng: np.random.Generator,
) -> Float[np.ndarray, " 4"]:
    """A hand-drawn version of a box (x0, y0, x1, y1) in a picture of ``size`` (height, width).

    Each edge moves by a normal deviate of ``box_noise`` sides, at most ``box_noise_max`` pixels,
    and stays in the picture. Without any area left, the box comes back as it is.
    """
    sides = np.tile(box[2:] - box[:2], 2)
    limit = config.box_noise_max
    noise = np.clip(config.box_noise * sides * rng.standard_normal(4), -limit, limit)
    moved = np.clip(box + noise, 0, [size[1], size[0], size[1], size[0]])
    return moved if (moved[2:] > moved[:2]).all() else box


def draw_exemplars(
    phrase: str,
    num_targets: int,
    num_others: int,
    config: SamplingConfig,
    rng: np.random.Generator,
) -> tuple[bool, Int[np.ndarray, " e"], Int[np.ndarray, " o"]]:
    """Whether boxes replace the phrase, and which targets are exemplars.

    Args:
      phrase: whether it may be replaced is ``config.visual_phrases``' to say.
      num_targets: of the phrase; without any there are no exemplars.
      num_others: targets of the picture's other phrases.

    Returns ``visual``, indices of positive boxes among the targets, of negative among the others.
    """
    visual, added, extra = rng.random(3) < (config.visual, config.boxes, config.negative_exemplars)
    visual = visual and bool(re.search(config.visual_phrases, phrase))
    none = np.zeros(0, np.int64)
    if not (visual or added) or not num_targets:
        return False, none, none
    count = int(rng.integers(1, min(num_targets, config.max_exemplars) + 1))
    positive = rng.permutation(num_targets)[:count]
    negative = rng.integers(num_others, size=1) if extra and num_others else none
    return bool(visual), positive, negative


def _join(pairs: Sequence[Pair | None]) -> Candidate:
    """One phrase's pairs of several pictures; None: the picture does not show it."""
    there = [pair for pair in pairs if pair is not None]
    found = [(number, i) for number, p in enumerate(pairs) if p for i in p.instances]
    crowds = tuple((number, i) for number, i in found if i.crowd)
    return Candidate(
        there[0].phrase,
        ",".join(pair.pair_id for pair in there),
        tuple((number, i) for number, i in found if not i.crowd),
        crowds,
        not crowds and all(pair.exhaustive for pair in there),
    )


def _draw(items: Sequence[Candidate], count: int, rng: np.random.Generator) -> list[Candidate]:
    return [items[i] for i in rng.permutation(len(items))[:count]]
