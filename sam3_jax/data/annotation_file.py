"""One annotation file, SA-Co or COCO, read entry by entry; no damage in one ends the reading."""

from __future__ import annotations

import collections
from typing import Any

from sam3_jax.data.entries import (
    BadEntryError,
    has_relative_boxes,
    is_id,
    is_phrase,
    parse_instance,
)
from sam3_jax.data.records import Answer, Category, Instance, Key, Picture, Problems, Record

Entry = dict[str, Any]


class AnnotationFile:
    """Turns a file's content into records.

    Args:
      data: with ``images``, ``annotations`` and, in COCO files, ``categories``.
      layout: "saco" or "coco".
      problems: takes what cannot be used.
      source: put before ids in ``problems``.
      mixed: take instances without a mask although others have one.
    """

    def __init__(
        self, data: Entry, layout: str, problems: Problems, source: str = "", *, mixed: bool = False
    ):
        self._data = data
        self._saco = layout == "saco"
        self._problems = problems
        self._source = source
        self._mixed = mixed
        self._images = self._read_images()
        self.categories = {} if self._saco else self._read_categories()

    def pictures(self) -> list[Picture]:
        """All usable images."""
        return [
            Picture(number, image["file_name"], (image["height"], image["width"]))
            for number, image in self._images.items()
        ]

    def records(self, *, negatives: bool) -> dict[Key, Record]:
        """All pairs, each with one answer, in the file's order.

        Without ``negatives``, of COCO layouts only those with instances, and those that lost one.
        """
        phrases = {number: category.phrase for number, category in self.categories.items()}
        instances, damaged = self._instances()
        records = {}
        for picture in self.pictures():
            image_id, name, size = picture
            image = self._images[image_id]
            own = {1: image["text_input"].strip()} if self._saco else phrases
            for category_id, phrase in own.items():
                key = self._key(image_id, category_id)
                found, whole = tuple(instances.get(key, ())), key not in damaged
                if not (self._saco or negatives or found) and whole:
                    continue
                answer = Answer(
                    found,
                    exhaustive=whole and bool(image.get("is_instance_exhaustive", True)),
                    pixel_exhaustive=whole and bool(image.get("is_pixel_exhaustive", True)),
                )
                records[key] = Record(key, image_id, category_id, name, size, phrase, (answer,))
        return records

    def _key(self, image_id: Any, category_id: Any) -> Key:
        return (image_id,) if self._saco else (image_id, category_id)

    def _bad(self, kind: str, entry: str, number: Any) -> None:
        self._problems.add(kind, f"{self._source}{entry} {number}")

    def _read_images(self) -> dict[Any, Entry]:
        """Usable images by id."""
        images: dict[Any, Entry] = {}
        for number, image in enumerate(self._data["images"]):
            if not isinstance(image, dict) or not is_id(image.get("id")):
                self._bad("image without id", "image number", number)
                continue
            kind = None
            if image["id"] in images:
                kind = "duplicate image id"
            elif not is_phrase(image.get("file_name")):
                kind = "image without file_name"
            elif not all(_is_length(image.get(side)) for side in ("height", "width")):
                kind = "image without height and width"
            elif self._saco and not is_phrase(image.get("text_input")):
                kind = "empty phrase"
            if kind:
                self._bad(kind, "image", image["id"])
            else:
                images[image["id"]] = image
        return images

    def _read_categories(self) -> dict[Any, Category]:
        """By id, without the category that Roboflow adds for the project itself.

        It is the parent of the others and nothing is annotated with it.
        """
        entries = [
            c for c in self._data["categories"] if isinstance(c, dict) and is_id(c.get("id"))
        ]
        annotations = [a for a in self._data["annotations"] if isinstance(a, dict)]
        used = {a["category_id"] for a in annotations if is_id(a.get("category_id"))}
        parents = {str(c.get("supercategory")) for c in entries}
        found: dict[Any, Category] = {}
        for category in entries:
            number, name = category["id"], category.get("name")
            top = category.get("supercategory") in (None, "", "none")
            if number in found:
                self._bad("duplicate category id", "category", number)
            elif not is_phrase(name):
                self._bad("empty phrase", "category", number)
            elif not (top and name in parents and number not in used):
                group = "" if top else str(category["supercategory"])
                found[number] = Category(name.strip(), group)
        return found

    def _instances(self) -> tuple[dict[Key, list[Instance]], set[Key]]:
        """Instances of each pair, and the pairs that lost one."""
        annotations, images = self._data["annotations"], self._images
        instances, damaged, seen = collections.defaultdict(list), set(), set()
        masks = any(isinstance(a, dict) and a.get("segmentation") for a in annotations)
        relative = self._saco and has_relative_boxes(annotations)
        for number, entry in enumerate(annotations):
            if not isinstance(entry, dict) or not is_id(entry.get("id")):
                self._bad("annotation without id", "annotation number", number)
                continue
            image_id, category_id = entry.get("image_id"), entry.get("category_id")
            if not is_id(image_id) or image_id not in images:
                self._bad("unknown image", "annotation", entry["id"])
                continue
            if not self._saco and not (is_id(category_id) and category_id in self.categories):
                self._bad("unknown category", "annotation", entry["id"])
                continue
            key, image = self._key(image_id, category_id), images[image_id]
            try:
                if entry["id"] in seen:
                    raise BadEntryError("duplicate annotation id")
                seen.add(entry["id"])
                size = (image["height"], image["width"])
                own = masks and not (self._mixed and not entry.get("segmentation"))
                instances[key].append(
                    parse_instance(entry, size, truth=True, masks=own, relative=relative)
                )
            except BadEntryError as error:
                self._bad(str(error), "annotation", entry["id"])
                damaged.add(key)
        return instances, damaged


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
