"""Annotation files of three layouts into one form.

- SA-Co (upstream ``scripts/eval/gold/README.md``): every entry of ``images`` is a pair of an image
  and a phrase (``text_input``). Several files hold the answers of several annotators to the same
  pairs.
- COCO instances: every image with every category is a pair.
- A Roboflow folder: pictures beside ``_annotations.coco.json``, else the same as COCO.

What is damaged is counted, kept by id and skipped. A pair that lost an annotation is no longer
exhaustive, so that a prediction of the lost object is not held against a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sam3_jax.data.annotation_file import AnnotationFile
from sam3_jax.data.entries import read_json
from sam3_jax.data.records import AnnotationError, Dataset, Key, Problems, Record

ROBOFLOW_FILE = "_annotations.coco.json"
MAX_BAD = 0.1


def load_annotations(
    paths: Sequence[Path],
    *,
    negatives: bool = True,
    max_bad: float = MAX_BAD,
    mixed: bool = False,
) -> Dataset:
    """Reads ground truth.

    Args:
      paths: one file or Roboflow folder; or SA-Co files of several annotators.
      negatives: of COCO layouts, keep the pairs of an image with categories that it does not show.
        SA-Co files name their negatives themselves.
      max_bad: largest share of a file's entries that may be unusable.
      mixed: take instances without a mask although others have one (training can use them).

    Raises:
      AnnotationError: unreadable, of no known layout, too much damage, or nothing left.
    """
    files = [annotation_file(path) for path in paths]
    contents = [read_json(file) for file in files]
    layouts = [_layout(data, file) for data, file in zip(contents, files, strict=True)]
    if len(files) > 1 and set(layouts) != {"saco"}:
        raise AnnotationError(
            f"{', '.join(map(str, files))}: several files are the answers of several annotators "
            "to the same image-phrase pairs, which only the SA-Co layout (images with "
            "text_input) has; evaluate other files one by one"
        )
    problems, total, answers, readers = Problems(), 0, [], []
    for number, (file, data) in enumerate(zip(files, contents, strict=True)):
        source = f"{file.name}: " if len(files) > 1 else ""
        readers.append(AnnotationFile(data, layouts[number], problems, source, mixed=mixed))
        answers.append(readers[-1].records(negatives=negatives))
        total += len(data["images"]) + len(data["annotations"])
        problems.check(str(file), total, max_bad)
    records = _join(answers, files, problems)
    problems.check(", ".join(map(str, files)), total, max_bad)
    if not records:
        raise AnnotationError(f"{files[0]}: there is no usable image-phrase pair in it")
    instances = [i for record in records for answer in record.answers for i in answer.instances]
    has_masks = bool(instances) and all(instance.rle is not None for instance in instances)
    return Dataset(
        layouts[0],
        records,
        has_masks,
        problems,
        [str(file) for file in files],
        readers[0].pictures(),
        readers[0].categories,
    )


def annotation_file(path: Path) -> Path:
    """The file itself, or the one in a Roboflow folder.

    Raises:
      AnnotationError: when a folder has none.
    """
    if not path.is_dir():
        return path
    file = path / ROBOFLOW_FILE
    if not file.is_file():
        splits = sorted(found.parent.name for found in path.glob(f"*/{ROBOFLOW_FILE}"))
        hint = f"name one of its splits: {', '.join(splits)}" if splits else "name the JSON file"
        raise AnnotationError(f"{path}: a folder without {ROBOFLOW_FILE}; {hint}")
    return file


def image_path(images: Path, file_name: str) -> Path | None:
    """Where a picture lies: at its name below the folder, or right in it; None if nowhere."""
    candidates = (images / file_name, images / Path(file_name).name)
    return next((path for path in candidates if path.is_file()), None)


def check_pictures(dataset: Dataset, images: Path, max_bad: float = MAX_BAD) -> None:
    """Refuses a folder that lacks too many of the pictures.

    Raises:
      AnnotationError: when more than the share ``max_bad`` of them is missing.
    """
    problems, names = Problems(), list(dict.fromkeys(r.file_name for r in dataset.records))
    for name in names:
        if image_path(images, name) is None:
            problems.add("missing pictures, is their folder right?", name)
    problems.check(str(images), len(names), max_bad)


def _layout(data: Any, file: Path) -> str:
    lists = ("images", "annotations")
    if not isinstance(data, dict) or not all(isinstance(data.get(name), list) for name in lists):
        raise AnnotationError(
            f"{file}: has no lists named images and annotations, as COCO and SA-Co files do"
        )
    if any(isinstance(image, dict) and "text_input" in image for image in data["images"]):
        return "saco"
    if not isinstance(data.get("categories"), list) or not data["categories"]:
        raise AnnotationError(
            f"{file}: its images have no text_input (SA-Co) and there is no list named categories "
            "(COCO), so there are no phrases"
        )
    return "coco"


def _join(
    answers: Sequence[dict[Key, Record]], files: Sequence[Path], problems: Problems
) -> list[Record]:
    """One record a pair with the answers of all annotators; pairs that some lack are dropped."""
    joined = []
    for key, record in answers[0].items():
        others = [other.get(key) for other in answers[1:]]
        for other, file in zip(others, files[1:], strict=True):
            if other is None:
                problems.add(f"pair missing in {file.name}", f"image {record.image_id}")
            elif (other.phrase, other.file_name) != (record.phrase, record.file_name):
                problems.add(f"another phrase or image in {file.name}", f"image {record.image_id}")
                others = [None]
        if None not in others:
            whole = record.answers + tuple(other.answers[0] for other in others)
            joined.append(record._replace(answers=whole))
    return joined
