"""Sessions on disk: one ``.npz`` file of arrays, with a JSON text in it for everything else.

Saved is what is tracked after the last frame, and every prompt. Snapshots and frames are not, nor
results that wait to be shown: going back behind the place where a session was saved computes from
its pass's first frame. A stream goes on with its next frame, whatever that is then. A file does not
hold the model; whether it has the same sizes is checked, its parameters are not.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sam3_jax.inference.files import replacing
from sam3_jax.models.tracker import Tracked
from sam3_jax.tracking.concepts.masklets import Masklets
from sam3_jax.tracking.state import TrackState
from sam3_jax.video.buckets import Packed
from sam3_jax.video.edits import Edit, Edits
from sam3_jax.video.phrases import Phrase
from sam3_jax.video.snapshots import Snapshot, put_back, take
from sam3_jax.video.timeline import Timeline

VERSION = 1
_META = "session"


class SessionError(ValueError):
    """A saved session that cannot be used; the message names the file and what differs."""


def save(timeline: Timeline, path: str | os.PathLike) -> None:
    """Writes a session; an older file stays as it was until the new one is whole.

    Raises:
      OSError: with the file's name, when it cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    meta = {"version": VERSION, "made_for": _made_for(timeline)}
    meta["tracking"] = _tracking(timeline, arrays)
    meta["edits"] = [_edit(e, arrays) for e in timeline.edits]
    meta["phrases"] = [_phrase(p, i, arrays) for i, p in enumerate(timeline.phrases)]
    meta["clicked"] = sorted(timeline.clicked.items())
    meta["dropped"] = sorted(timeline.dropped)
    meta["first_id"], meta["next_id"] = timeline.first_id, timeline.next_id
    with replacing(Path(path)) as temporary, temporary.open("wb") as file:
        np.savez(file, **{_META: np.asarray(json.dumps(meta))}, **arrays)


def restore(timeline: Timeline, path: str | os.PathLike) -> None:
    """Puts a session into a fresh timeline.

    Raises:
      SessionError: when the file is none, or of another video, model or rules.
    """
    name = os.fspath(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        meta = json.loads(str(arrays.pop(_META)))
    except FileNotFoundError as error:
        raise SessionError(f"{name}: no such file; check the path") from error
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise SessionError(f"{name}: not a saved session, or cut off ({error})") from error
    _check(meta, timeline, name)
    timeline.phrases = [_read_phrase(p, i, arrays) for i, p in enumerate(meta["phrases"])]
    timeline.edits = Edits(tuple(_read_edit(e, arrays) for e in meta["edits"]))
    timeline.clicked = {int(i): int(frame) for i, frame in meta["clicked"]}
    timeline.dropped = set(meta["dropped"])
    timeline.first_id, timeline.next_id = meta["first_id"], meta.get("next_id", 0)
    put_back(timeline.tracking, _read_tracking(meta["tracking"], arrays))
    index = timeline.tracking.index
    if index is not None and timeline.features.total is None:
        timeline.features.go_on(index + 1)
    elif index is not None:
        timeline.snapshots.keep(timeline.tracking, always=True)


def _made_for(timeline: Timeline) -> dict[str, Any]:
    """What must be the same for a session to go on."""
    video, kit = timeline.features.video, timeline.kit
    facts = {
        "video size": list(video.size),
        "video frames": timeline.features.total,
        "model": dataclasses.asdict(kit.model),
        "rules": dataclasses.asdict(kit.config),
        "dtype": str(np.dtype(kit.engine.dtype)),
    }
    return json.loads(json.dumps(facts))


def _check(meta: dict[str, Any], timeline: Timeline, name: str) -> None:
    if meta.get("version") != VERSION:
        raise SessionError(
            f"{name}: has version {meta.get('version')}, this program reads {VERSION}: save it anew"
        )
    here = _made_for(timeline)
    for key, value in meta["made_for"].items():
        if here[key] != value:
            short = f"{value}, here {here[key]}" if len(str(value)) < 40 else "it is another here"
            raise SessionError(f"{name}: was saved with another {key} ({short})")


def _tracking(timeline: Timeline, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    snapshot = take(timeline.tracking)
    for key, column in snapshot.table._asdict().items():
        arrays[f"table/{key}"] = np.asarray(column)
    for key, values in snapshot.packed.fields.items():
        # NumPy's files do not know bfloat16.
        arrays[f"state/{key}"] = values.view(np.uint16) if values.itemsize == 2 else values
    arrays["rows"] = snapshot.packed.rows
    return {
        "buckets": snapshot.packed.buckets,
        "index": snapshot.index,
        "origin": snapshot.origin,
        "backward": snapshot.backward,
        "applied": sorted(snapshot.applied),
    }


def _read_tracking(meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> Snapshot:
    table = Masklets(*(arrays[f"table/{key}"] for key in Masklets._fields))
    fields = {k: arrays[f"state/{k}"] for k in TrackState._fields if f"state/{k}" in arrays}
    fields = {
        k: v.view(ml_dtypes.bfloat16) if v.dtype == np.uint16 else v for k, v in fields.items()
    }
    packed = Packed(arrays["rows"], meta["buckets"], fields)
    applied = frozenset(meta["applied"])
    return Snapshot(table, packed, meta["index"], meta["origin"], meta["backward"], applied)


def _edit(edit: Edit, arrays: dict[str, np.ndarray]) -> list[int]:
    for key, value in edit.found._asdict().items():
        arrays[f"edit/{edit.serial}/{key}"] = np.asarray(value)
    if edit.mask is not None:
        arrays[f"edit/{edit.serial}/bits"] = edit.mask
    return [edit.serial, edit.frame, edit.object_id]


def _read_edit(meta: list[int], arrays: dict[str, np.ndarray]) -> Edit:
    own = f"edit/{meta[0]}/"
    found = Tracked(*(arrays[own + key] for key in Tracked._fields))
    return Edit(*meta, found, arrays.get(own + "bits"))


def _phrase(phrase: Phrase, number: int, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    for frame, (boxes, labels) in phrase.exemplars.items():
        arrays[f"phrase/{number}/{frame}/boxes"] = np.asarray(boxes, np.float32)
        if labels is not None:
            arrays[f"phrase/{number}/{frame}/labels"] = np.asarray(labels)
    return {"text": phrase.text, "frames": sorted(phrase.exemplars)}


def _read_phrase(meta: dict[str, Any], number: int, arrays: dict[str, np.ndarray]) -> Phrase:
    exemplars = {}
    for frame in meta["frames"]:
        own = f"phrase/{number}/{frame}/"
        exemplars[frame] = arrays[own + "boxes"], arrays.get(own + "labels")
    return Phrase(meta["text"], exemplars)
