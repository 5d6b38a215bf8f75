"""Files of transformers' four SAM 3 classes seen as ``sam3.pt``, and back.

All operations move numbers without touching them, so that both directions are exact to the bit.
Names and rules: ``hf_rules.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, get_args

import numpy as np

from sam3_jax.config import ModelConfig
from sam3_jax.convert.hf_rules import Layout, Rule, build_rules

LAYOUTS: tuple[Layout, ...] = get_args(Layout)

# Tables that transformers computes again and that some of its versions stored.
_RECOMPUTED = re.compile(
    r"(^|\.)(position_ids|(rotary_emb\.)?(original_)?inv_freq|rope_embeddings_(cos|sin))$"
)


class UpstreamTensors(NamedTuple):
    """A transformers file seen as ``sam3.pt``.

    Attributes:
      thunks: name in ``sam3.pt`` -> function that makes the array. ``pos_embed`` comes without
        its class row.
      unknown: names in the file that belong to no rule.
      ignored: names in the file that are computed again, never read.
      missing: names (transformers' own, as in its ``state_dict``) that the layout has and the file
        has not.
    """

    thunks: dict[str, Callable[[], np.ndarray]]
    unknown: list[str]
    ignored: list[str]
    missing: list[str]


def parts_of(layout: Layout) -> tuple[str, ...]:
    """Which of the parts ``image`` and ``tracker`` a layout holds."""
    if layout == "Sam3VideoModel":
        return ("image", "tracker")
    return ("image",) if layout == "Sam3Model" else ("tracker",)


def provided_names(layout: Layout, config: ModelConfig) -> list[str]:
    """Names in ``sam3.pt`` that a layout can fill.

    No layout has the point branch of the geometry encoder (``points_*``), and only the two video
    layouts have the memory of the tracker.
    """
    return [name for rule in build_rules(layout, config) for name in rule.upstream]


def canonical(layout: Layout, name: str) -> str:
    """The name in the class's ``state_dict`` of a tensor in a file of that layout.

    ``save_pretrained`` writes trackers under other names than those in memory: it undoes the
    renaming that lets a tracker load from the video model's file, and adds prefixes on the way.
    """
    if layout == "Sam3VideoModel":
        return re.sub(r"^(tracker_model\.)+", "tracker_model.", name)
    if layout == "Sam3Model":
        return name.removeprefix("detector_model.")
    name = re.sub(r"^(tracker_model\.)+", "", name)
    name = re.sub(r"^detector_model\.vision_encoder\.backbone\.", "vision_encoder.backbone.", name)
    return re.sub(r"^tracker_neck\.", "vision_encoder.neck.", name)


def detect_layout(names: Iterable[str]) -> Layout | None:
    """The layout of a file with these tensor names; None if it is none of transformers' four."""
    names = list(names)

    def have(layout: Layout, *prefixes: str) -> bool:
        short = [canonical(layout, name) for name in names]
        return all(any(name.startswith(prefix) for name in short) for prefix in prefixes)

    if have("Sam3VideoModel", "detector_model.detr_decoder.") and (
        have("Sam3VideoModel", "tracker_neck.") or have("Sam3VideoModel", "tracker_model.")
    ):
        return "Sam3VideoModel"
    if have("Sam3Model", "detr_decoder.", "vision_encoder.neck."):
        return "Sam3Model"
    if not have("Sam3TrackerModel", "mask_decoder.", "vision_encoder.neck.fpn_layers."):
        return None
    memory = have("Sam3TrackerVideoModel", "memory_attention.")
    return "Sam3TrackerVideoModel" if memory else "Sam3TrackerModel"


def _agreeing(names: tuple[str, ...], arrays: list[np.ndarray]) -> np.ndarray:
    for name, array in zip(names[1:], arrays[1:], strict=True):
        if not np.array_equal(array, arrays[0]):
            raise ValueError(
                f"{names[0]} and {name} differ, but the released model has one matrix for both; "
                "the file was not made from released weights"
            )
    return arrays[0]


def to_upstream(
    layout: Layout, tensors: Mapping[str, np.ndarray], config: ModelConfig
) -> UpstreamTensors:
    """Sees a transformers file as ``sam3.pt``.

    Args:
      layout: class that the file belongs to (:func:`detect_layout`).
      tensors: name in the file -> array; views of a memory map are read only when a thunk runs.
      config: sizes of the model.

    A thunk raises ValueError if the two copies of the prompt encoder's Gaussian matrix differ, or
    if q, k and v cannot be joined.
    """
    names = {canonical(layout, name): name for name in tensors}
    rules = build_rules(layout, config)
    known = {name for rule in rules for name in rule.hf}
    ignored = [n for c, n in names.items() if c not in known and _RECOMPUTED.search(c)]
    unknown = [n for c, n in names.items() if c not in known and not _RECOMPUTED.search(c)]
    missing = [name for rule in rules for name in rule.hf if name not in names]

    def make(rule: Rule, index: int) -> np.ndarray:
        sources = tuple(names[name] for name in rule.hf)
        arrays = [tensors[name] for name in sources]
        if rule.op == "concat":
            return np.concatenate(arrays)
        if rule.op == "copies":
            return _agreeing(sources, arrays)
        if rule.op == "split":
            return np.split(arrays[0], len(rule.upstream))[index]
        return arrays[0].T if rule.op == "transpose" else arrays[0]

    thunks = {
        name: lambda rule=rule, index=index: make(rule, index)
        for rule in rules
        if all(hf in names for hf in rule.hf)
        for index, name in enumerate(rule.upstream)
    }
    return UpstreamTensors(thunks, unknown, ignored, missing)


def from_upstream(
    layout: Layout, get: Callable[[str], np.ndarray], config: ModelConfig
) -> dict[str, Callable[[], np.ndarray]]:
    """The tensors of a transformers class from those of ``sam3.pt``.

    Args:
      layout: class to make.
      get: array of a name in ``sam3.pt``; ``pos_embed`` with or without its class row.
      config: sizes of the model.

    Returns:
      Name in the class's ``state_dict`` -> function that makes the array.
    """

    def make(rule: Rule, index: int) -> np.ndarray:
        arrays = [get(name) for name in rule.upstream]
        if rule.op == "concat":
            return np.split(arrays[0], len(rule.hf))[index]
        if rule.op == "split":
            return np.concatenate(arrays)
        if rule.op == "positions":
            return arrays[0][:, -(config.vision.pos_grid**2) :]
        return arrays[0].T if rule.op == "transpose" else arrays[0]

    return {
        name: lambda rule=rule, index=index: make(rule, index)
        for rule in build_rules(layout, config)
        for index, name in enumerate(rule.hf)
    }
