"""Many pictures through the model: reading, devices and writing overlap.

Threads read and resize pictures ahead of the devices (``reading.py``); batches are started while
the one before is still being computed (``detecting.py``); threads turn what comes back into run
lengths and files (``finishing.py``). Records are written in the order of the work, by one thread.
Memory is bounded: so many batches on the way, and so many bytes of decoded pictures; where these
are spent, a batch starts before it is full.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sam3_jax.inference.detecting import detect
from sam3_jax.inference.engine import Engine
from sam3_jax.inference.finishing import finish_ahead
from sam3_jax.inference.reading import load_ahead
from sam3_jax.inference.work import Settings, Work


def process(
    engine: Engine, work: Iterable[Work], output: Path, settings: Settings
) -> Iterator[dict[str, Any]]:
    """Works through pictures; yields their records in order, good ones and errors.

    The other outputs of a picture are complete when its record comes.

    Args:
      engine: the model.
      work: what to do; may be endless.
      output: an existing folder.
      settings: how.

    Raises:
      RuntimeError: when the checkpoint lacks what a job needs, or the devices fail.
    """
    with (
        ThreadPoolExecutor(settings.workers, "read") as readers,
        ThreadPoolExecutor(settings.workers, "write") as finishers,
    ):
        try:
            held: dict[int, int] = {}  # bytes of the pictures under way, by their index
            loaded = load_ahead(readers, engine, work, settings, held)
            found = detect(readers, engine, loaded, settings)
            for record in finish_ahead(finishers, engine, found, output, settings):
                held.pop(record["index"], None)
                yield record
        finally:
            for pool in (readers, finishers):
                pool.shutdown(wait=True, cancel_futures=True)
