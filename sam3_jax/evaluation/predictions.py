"""Predictions of any model, or of ours, for the pairs of a dataset.

Two forms: a list as COCO's result format has it (upstream ``sam3/eval/coco_writer.py`` writes the
same), which names images and categories by the ids of the ground truth; and our own
``results.json`` or ``predictions.json`` (``inference/merge.py``), which has images by file name
and categories by phrase.
"""

from __future__ import annotations

import collections
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from sam3_jax.data.annotations import MAX_BAD
from sam3_jax.data.entries import (
    BadEntryError,
    has_relative_boxes,
    is_id,
    parse_instance,
    read_json,
)
from sam3_jax.data.records import (
    AnnotationError,
    Dataset,
    Instance,
    Key,
    Problems,
)


class Predictions(NamedTuple):
    """What a model found. A pair that is not in ``found`` has no instances."""

    found: dict[Key, list[Instance]]
    failed: dict[str, str]  # file name -> why there is no prediction for the image
    has_masks: bool
    problems: Problems
    notes: list[str]  # what a reader of the figures should know


def load_predictions(path: Path, dataset: Dataset, max_bad: float = MAX_BAD) -> Predictions:
    """Reads predictions and assigns them to the pairs of ``dataset``.

    Raises:
      AnnotationError: unreadable, of neither form, too much damage, or of other images.
    """
    return assign_predictions(read_json(path), path, dataset, max_bad)


def assign_predictions(
    data: Any, path: Path, dataset: Dataset, max_bad: float = MAX_BAD
) -> Predictions:
    """:func:`load_predictions` of contents that were read; ``path`` is for messages.

    Raises:
      AnnotationError: of neither form, too much damage, or of other images.
    """
    ours = isinstance(data, dict) and all(
        isinstance(data.get(name), list) for name in ("images", "annotations", "categories")
    )
    if not ours and not isinstance(data, list):
        raise AnnotationError(
            f"{path}: is neither a list of COCO results nor a results.json or predictions.json of "
            "this program"
        )
    entries = data["annotations"] if ours else data
    if entries and not any(isinstance(e, dict) and "score" in e for e in entries):
        raise AnnotationError(f"{path}: its entries have no score; is this a ground truth?")
    problems, notes = Problems(), []
    failed: dict[str, str] = {}
    if ours:
        keys, failed, notes = _keys_by_name(data, dataset)
    else:
        keys = collections.defaultdict(list)
        for record in dataset.records:
            # SA-Co's pairs have one category, whatever a model calls it.
            part = (record.image_id,) if dataset.layout == "saco" else record.key
            keys[part].append(record.key)
    found, has_masks, strange = _assign(entries, dataset, keys, problems, by_pair=not ours)
    if entries and not found and strange:
        raise AnnotationError(
            f"{path}: none of its {len(entries)} predictions belongs to an image-phrase pair of "
            f"{dataset.sources[0]}; do they name its image ids"
            + (", file names and phrases?" if ours else " and category ids?")
        )
    if strange:
        notes.append(f"{strange} predictions of pairs outside the ground truth were left out")
    problems.check(str(path), len(entries), max_bad)
    return Predictions(found, failed, has_masks, problems, notes)


def _assign(
    entries: list[Any],
    dataset: Dataset,
    keys: dict[Key, list[Key]],
    problems: Problems,
    *,
    by_pair: bool,
) -> tuple[dict[Key, list[Instance]], bool, int]:
    """Instances of each pair, whether they have masks, and the number of those of no pair."""
    sizes = {record.key: record.size for record in dataset.records}
    pair_alone = by_pair and dataset.layout == "saco"
    masks = any(isinstance(e, dict) and e.get("segmentation") for e in entries)
    relative = dataset.layout == "saco" and has_relative_boxes(entries)
    found, strange = collections.defaultdict(list), 0
    for number, entry in enumerate(entries):
        name = f"prediction {number}"
        ids = (entry.get("image_id"), entry.get("category_id")) if isinstance(entry, dict) else ()
        ids = ids[:1] if pair_alone else ids
        if not ids or not all(map(is_id, ids)) or "score" not in entry:
            problems.add("without image_id, category_id or score", name)
            continue
        targets = keys.get(ids, ())
        strange += not targets
        try:
            for key in targets:
                found[key].append(
                    parse_instance(entry, sizes[key], truth=False, masks=masks, relative=relative)
                )
        except BadEntryError as error:
            problems.add(str(error), name)
    return dict(found), masks or not entries, strange


def _keys_by_name(
    data: dict[str, Any], dataset: Dataset
) -> tuple[dict[Key, list[Key]], dict[str, str], list[str]]:
    """(image id, category id) of a results file -> pairs; images that failed; notes."""
    pairs, files = collections.defaultdict(list), set()
    for record in dataset.records:
        pairs[record.file_name, record.phrase].append(record.key)
        files.add(record.file_name)
    phrases = {c["id"]: c["name"] for c in data["categories"]}
    keys, failed, covered = {}, {}, set()
    for image in data["images"]:
        file_name = _known(str(image.get("file_name")), files)
        if file_name is None:
            continue
        covered.add(file_name)
        if image.get("status") == "error":
            failed[file_name] = str(image.get("error", "unknown"))
        for category, phrase in phrases.items():
            if (file_name, phrase) in pairs:
                keys[image.get("id"), category] = pairs[file_name, phrase]
    asked, notes = set(phrases.values()), []
    missing = sum(r.file_name not in covered or r.phrase not in asked for r in dataset.records)
    if missing:
        notes.append(
            f"{missing} of {len(dataset.records)} pairs are not in the predictions (image or "
            "phrase): counted as nothing found"
        )
    return keys, failed, notes


def _known(name: str, files: set[str]) -> str | None:
    """The ground truth's name of a picture: the same, or the end of a longer path."""
    parts = PurePosixPath(name).parts
    tails = ("/".join(parts[i:]) for i in range(len(parts)))
    return name if name in files else next((tail for tail in tails if tail in files), None)
