"""Which of the five ways of naming a file uses, and the table in its names."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from sam3_jax.checkpoint.parts import in_parts
from sam3_jax.config import ModelConfig
from sam3_jax.convert import hf_names
from sam3_jax.convert.errors import ConversionError
from sam3_jax.convert.hf_names import Unused
from sam3_jax.convert.rows import Row
from sam3_jax.convert.table import build_table, unused_names

# Parameters of which at least one is there if a file has anything of the part at all.
_OWN = {
    "image": ("text/", "geometry/", "fusion/", "decoder/", "scoring/", "segmentation/"),
    "tracker": ("tracker/memory_attention/", "tracker/memory_encoder/"),
    "clicks": ("tracker/prompt_encoder/", "tracker/mask_decoder/"),
}
RELEASE = "sam3.pt"


class Layout(NamedTuple):
    """The table in the names of one kind of file."""

    name: str  # "sam3.pt" or the class of transformers
    rows: list[Row]
    unused: list[Unused]
    copies: dict[str, str]  # a tensor that repeats another one

    @property
    def is_release(self) -> bool:
        """Whether the names are those of Meta's own file."""
        return self.name == RELEASE

    def held_parts(self, names: Collection[str]) -> tuple[str, ...]:
        """Parts of the model that a file with these names has something of; "clicks" only where
        it lacks the rest of the tracker."""
        present = [target for row in self.rows if row.source in names for target in row.targets]
        held = [part for part, own in _OWN.items() if any(t.startswith(own) for t in present)]
        return tuple(part for part in held if part != "clicks" or "tracker" not in held)

    def fillable(self, target: str) -> bool:
        """Whether zeros may stand for a parameter: HF has no point prompts of the detector."""
        return target.startswith("geometry/point_") and not self.is_release


def release_layout(config: ModelConfig) -> Layout:
    """The names of ``sam3.pt``. Raises ConversionError for a model that PyTorch does not have."""
    _check_patches(config)
    unused = [Unused(name, name) for name in unused_names(config)]
    return Layout(RELEASE, build_table(config), unused, {})


def hf_layout(name: str, config: ModelConfig) -> Layout:
    """The names of one of transformers' four classes. Raises as :func:`release_layout`."""
    _check_patches(config)
    rename: Callable[[str], str]
    if name == "Sam3VideoModel":
        rename, parts = str, ("image", "tracker")
    elif name == "Sam3Model":
        rename, parts = hf_names.detector_name, ("image",)
    else:
        rename = hf_names.tracker_name
        parts = ("tracker",) if name == "Sam3TrackerVideoModel" else ("clicks",)
    rows = [row for row in hf_names.hf_rows(config) if in_parts(row.targets[0], parts)]
    unused = [item for item in hf_names.hf_unused(config) if unused_in_parts(item.stored, parts)]
    copies = {hf_names.GAUSSIAN_COPY: hf_names.GAUSSIAN} if parts != ("image",) else {}
    return Layout(
        name,
        [row._replace(source=rename(row.source)) for row in rows],
        [item._replace(source=rename(item.source)) for item in unused],
        {rename(copy): rename(original) for copy, original in copies.items()},
    )


def _check_patches(config: ModelConfig) -> None:
    if config.vision.stem:
        raise ConversionError(
            f"this model has convolutions before its patches (vision.stem = {config.vision.stem}), "
            "as the demo's has, and no SAM 3 of PyTorch does: there are no names for them"
        )


def unused_in_parts(stored: str, parts: Collection[str]) -> bool:
    """Whether an unused tensor (its name in ``sam3.pt``) belongs to one of the parts."""
    if ".trunk." in stored:
        return True
    if stored.startswith("tracker."):
        return "tracker" in parts
    if ".sam2_convs." in stored:
        return "tracker" in parts or "clicks" in parts
    return "image" in parts


def find_layout(names: Collection[str], config: ModelConfig, where: str) -> Layout:
    """The layout that a file with these (normalised) names has.

    Raises:
      ConversionError: when the names are those of no SAM 3, or of SAM 3.1.
    """
    if hf_names.is_multiplex(names):
        raise ConversionError(
            f"{where}: holds SAM 3.1 (object multiplex), whose tracker is another model; this "
            "program converts SAM 3: sam3.pt or model.safetensors of facebook/sam3"
        )
    starts = {name.split(".")[0] for name in names}
    if starts & {"detector", "tracker"}:
        return release_layout(config)
    if starts & {"detector_model", "tracker_model", "tracker_neck"}:
        name = "Sam3VideoModel"
    elif "detr_decoder" in starts:
        name = "Sam3Model"
    elif {"vision_encoder", "prompt_encoder"} <= starts:
        name = "Sam3TrackerVideoModel"
    else:
        raise ConversionError(
            f"{where}: its tensors are not named like those of any SAM 3 (the first is "
            f"{next(iter(names), None)!r}); expected detector.* and tracker.*, or one of "
            "transformers' Sam3VideoModel, Sam3Model, Sam3TrackerVideoModel, Sam3TrackerModel"
        )
    return _with_copies_only(hf_layout(name, config), names)


def _with_copies_only(layout: Layout, names: Collection[str]) -> Layout:
    """Older transformers tie the two copies of a tensor and save one: reads whichever is there."""
    only = {
        original: copy
        for copy, original in layout.copies.items()
        if original not in names and copy in names
    }
    rows = [row._replace(source=only.get(row.source, row.source)) for row in layout.rows]
    copies = {copy: kept for copy, kept in layout.copies.items() if copy not in only.values()}
    return layout._replace(rows=rows, copies=copies)
