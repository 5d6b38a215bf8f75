"""A whole run of ``infer.py``: what is left to do, the pipeline, progress, and the results file.

Every process of a run appends to a part of its own and skips what any part has already
(``records.py``); the parts become one file when all is done (``merge.py``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from sam3_jax.inference import records, writers
from sam3_jax.inference.engine import Engine
from sam3_jax.inference.files import output_names
from sam3_jax.inference.jobs import BadLine, Job, Share
from sam3_jax.inference.merge import merge, read_done
from sam3_jax.inference.pipeline import process
from sam3_jax.inference.work import Settings, Work
from sam3_jax.sharding import make_mesh


class Summary(NamedTuple):
    """What came of a run, in this process."""

    done: int  # pictures, those of earlier runs included
    skipped: int  # of these, done by earlier runs
    failed: int
    instances: int  # found now
    results: Path


def load_engine(checkpoint: str, *, dtype: str, resolution: int | None) -> Engine:
    """The model on all devices of this host, the batch spread over them.

    Raises:
      CheckpointError, ValueError: see :meth:`Engine.from_pretrained`.
    """
    devices = jax.local_devices()  # hosts do not talk while they work
    mesh = make_mesh(devices=devices) if len(devices) > 1 else None
    return Engine.from_pretrained(checkpoint, dtype=dtype, mesh=mesh, resolution=resolution)


def run(
    engine: Engine,
    jobs: Sequence[Job | BadLine],
    output: Path,
    settings: Settings,
    *,
    info: dict[str, Any],
    share: Share = Share(),  # noqa: B008  (immutable)
    overwrite: bool = False,
) -> Summary:
    """Does what is left of the jobs, and merges the results.

    Args:
      engine: the model.
      jobs: of all processes; lines of a job file that cannot be used are reported as failures.
      output: an existing folder.
      settings: of the pipeline.
      info: further settings that the results depend on.
      share: of this process.
      overwrite: forget earlier results instead of going on.

    Raises:
      UsageError: when the folder holds results of other settings.
      OSError: when results cannot be written.
      RuntimeError: when the devices fail or the checkpoint lacks what a job needs.
    """
    named = (job.names for job in jobs if isinstance(job, Job))
    phrases = list(dict.fromkeys(name for names in named for name in names))
    settings = settings._replace(classes=tuple(phrases))
    if overwrite and share.process == 0:
        records.discard(output)
    part = records.part_path(output, *share)
    done = read_done(output)
    with records.RecordWriter(part, {**info, "phrases": phrases}) as writer:
        mine, skipped = _share_of(jobs, share, done)
        if settings.yolo:
            writers.write_classes(output, phrases)
        try:
            done, failed, instances = _work(engine, mine, output, settings, writer)
        finally:
            if share.processes == 1:
                merge(output)
    together = share.processes > 1 and jax.process_count() == share.processes
    if together:
        _merge_together(output)
    results = output / records.MERGED if share.processes == 1 or together else part
    return Summary(done + skipped, skipped, failed, instances, results)


def _share_of(
    jobs: Sequence[Job | BadLine], share: Share, done: set[str]
) -> tuple[list[Work | dict], int]:
    """This process's jobs that are not done, records of bad lines, and how many are done."""
    paths = [job.image if isinstance(job, Job) else Path("line") for job in jobs]
    mine: list[Work | dict] = []
    skipped = 0
    for i, (job, name) in enumerate(zip(jobs, output_names(paths), strict=True)):
        if i % share.processes != share.process:
            continue
        if isinstance(job, BadLine):
            key = f"line {job.number}"
            mine.append(records.error_record(key, job.text, f"{key}: {job.error}", index=i))
        elif job.key in done:
            skipped += 1
        else:
            mine.append(Work(i, job, name))
    return mine, skipped


def _work(
    engine: Engine,
    mine: Sequence[Work | dict],
    output: Path,
    settings: Settings,
    writer: records.RecordWriter,
) -> tuple[int, int, int]:
    """Runs the pipeline with a progress bar; counts of good and failed pictures and instances."""
    done = failed = instances = 0
    bar = tqdm(total=len(mine), unit="picture", dynamic_ncols=True, disable=None, smoothing=0.1)
    with bar:
        for record in _results(engine, mine, output, settings):
            writer.write(record)
            if record["status"] == "ok":
                done += 1
                instances += len(record["annotations"])
            else:
                failed += 1
                message = f"failed: {record['file_name']}: {record['error']}"
                tqdm.write(message, file=sys.stderr)
            bar.set_postfix(instances=instances, failed=failed, refresh=False)
            bar.update()
    return done, failed, instances


def _results(
    engine: Engine, mine: Sequence[Work | dict], output: Path, settings: Settings
) -> Iterator[dict]:
    """Records of bad lines, then of pictures."""
    yield from (item for item in mine if isinstance(item, dict))
    work = [item for item in mine if isinstance(item, Work)]
    yield from process(engine, work, output, settings)


def _merge_together(output: Path) -> None:
    """Waits for all hosts; the first one then merges."""
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("sam3_jax: all pictures done")
    if jax.process_index() == 0:
        merge(output)
    multihost_utils.sync_global_devices("sam3_jax: merged")
