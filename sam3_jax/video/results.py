"""Results of a video as they come: a file that frames are appended to.

``frames/NAME.jsonl`` in the output folder. Its first line describes video and run,
``{"schema_version": 1, "run": {"video": {"name": "clip.mp4", "width": 640, "height": 480, ...},
...}}``; every further line is one frame:

    {"frame": 17, "time": 0.68, "error": null,
     "objects": [{"id": 3, "phrase": "red car", "segmentation": {"size": [480, 640], "counts": ...},
                  "bbox": [x, y, w, h], "area": 1234, "score": 0.91, "tracker_score": 0.87}]}

``score`` is that of the detection that the object came of, the same in every frame, 1 after a
click; ``tracker_score`` is how sure the tracker is that the object is in this frame (where a phrase
has just found it, its detection's score). Files from before ``tracker_score`` was written lack it.

The rules are those of ``sam3_jax/inference/records.py``: nothing written is changed, so a run may
be killed at any time, and a torn last line is cut off by the next one. A frame may have several
records, when a correction has changed it: the last one counts. ``tracks.py`` makes one file in
YouTube-VIS layout of them.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sam3_jax.inference.files import UsageError
from sam3_jax.inference.records import RecordWriter, read_run
from sam3_jax.inference.rle import rle_of_crop
from sam3_jax.inference.visualize import extent_of
from sam3_jax.video.objects import Objects, check_objects
from sam3_jax.video.reader import Frame, VideoSource

FOLDER = "frames"
_ABSENT = -1


def results_path(output: Path, name: str) -> Path:
    """The file of a video's frames."""
    return output / FOLDER / f"{name}.jsonl"


def open_results(path: Path, video: VideoSource, run: dict[str, Any]) -> RecordWriter:
    """A writer of :func:`frame_record`, which goes on where the file ends.

    Args:
      path: of :func:`results_path`; its folder is made.
      video: what is described in the first line.
      run: the settings that results depend on: JSON values.

    Raises:
      UsageError: when the file has results of another video or with other settings.
      OSError: when it cannot be opened.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = video.size
    facts = {"name": video.name, "width": width, "height": height, "fps": float(video.rate)}
    return RecordWriter(path, {"video": facts, **run})


def frame_record(frame: Frame, objects: Objects, size: tuple[int, int]) -> dict[str, Any]:
    """What is recorded of a frame.

    Args:
      size: (height, width) of the video; a missing frame has no picture to tell it.

    Raises:
      ValueError: when the objects do not fit the frame.
    """
    check_objects(objects, size)
    return {
        "frame": frame.index,
        "time": round(frame.time, 6),
        "error": frame.error,
        "objects": [_entry(objects, i, size) for i in range(len(objects.ids))],
    }


def _entry(objects: Objects, i: int, size: tuple[int, int]) -> dict[str, Any]:
    height, width = size
    # Run lengths of what is around the object take a tenth of the time of those of a whole frame.
    x0, y0, x1, y1 = extent_of(objects.masks[i]) or (0, 0, 0, 0)
    crop = objects.masks[i, y0:y1, x0:x1]
    box = objects.boxes[i].clip(0, (width, height, width, height)).tolist()
    return {
        "id": int(objects.ids[i]),
        "phrase": objects.phrases[i],
        "segmentation": rle_of_crop(crop, (y0, x0), size),
        "bbox": [round(v, 2) for v in (box[0], box[1], box[2] - box[0], box[3] - box[1])],
        "area": int(crop.sum()),
        "score": round(float(objects.scores[i]), 6),
        "tracker_score": round(float(objects.tracker_scores[i]), 6),
    }


class Recorded(NamedTuple):
    """The frames of a results file: where the record that counts begins, 8 bytes a frame."""

    path: Path
    run: dict[str, Any]
    offsets: array[int]  # for each frame number, -1 without a record

    def frames(self) -> Iterator[dict[str, Any]]:
        """The records that count, by frame number."""
        with self.path.open("rb") as file:
            for offset in self.offsets:
                if offset != _ABSENT:
                    file.seek(offset)
                    yield json.loads(file.readline())

    @property
    def done(self) -> int:
        """How many frames from the first on have a record: where a run goes on."""
        return next((i for i, offset in enumerate(self.offsets) if offset == _ABSENT), self.length)

    @property
    def length(self) -> int:
        """One more than the last frame that has a record."""
        return len(self.offsets)


def read_results(path: Path) -> Recorded:
    """What a results file has; reads it once, holding a line at a time.

    Raises:
      UsageError: when it is not there, without a complete first line, or of another kind.
    """
    run = read_run(path)
    if run is None:
        raise UsageError(f"no results in {path}: run the video first")
    offsets = array("q")
    with path.open("rb") as file:
        offset = len(file.readline())
        for line in file:
            number = _frame_number(line)
            if number is not None:
                offsets.extend([_ABSENT] * (number + 1 - len(offsets)))
                offsets[number] = offset
            offset += len(line)
    return Recorded(path, run, offsets)


def _frame_number(line: bytes) -> int | None:
    """None for a line that is torn or damaged, which counts as not there."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:  # a disk without power can leave zeros
        return None
    number = record.get("frame") if isinstance(record, dict) else None
    return number if isinstance(number, int) and number >= 0 else None
