"""A thread that works ahead: frames are decoded while the device works on earlier ones."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator
from typing import NamedTuple, TypeVar

T = TypeVar("T")
_POLL = 0.1  # seconds until the thread notices that nobody wants more


class _Failed(NamedTuple):
    error: BaseException


_END = object()


def prefetch(items: Iterator[T], depth: int = 4) -> Generator[T, None, None]:
    """The same items, up to ``depth`` of them made ahead in a thread.

    Memory is that of ``depth`` + 2 items. An exception of ``items`` comes after the items before
    it. Closing the result (leaving a loop over it closes it once nothing refers to it) ends the
    thread, and closes ``items`` in it, as soon as the item in the making is there: a camera that
    delivers nothing is not waited for.

    Raises:
      ValueError: when ``depth`` is less than 1.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    return _drain(items, queue.Queue(depth), threading.Event())


def _drain(
    items: Iterator[T], ready: queue.Queue, stopped: threading.Event
) -> Generator[T, None, None]:
    # A daemon: a source that blocks must not keep the process from ending.
    thread = threading.Thread(target=_fill, args=(items, ready, stopped), daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, _Failed):
                raise item.error
            yield item
            item = None  # or it would stay in memory until the next one has come
    finally:
        stopped.set()


def _fill(items: Iterator[T], ready: queue.Queue, stopped: threading.Event) -> None:
    def put(item: object) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=_POLL)
                return True
        return False

    try:
        for item in items:
            if not put(item):
                break
            item = None
    except BaseException as error:  # of the thread's work, to be raised where it is waited for
        put(_Failed(error))
    else:
        put(_END)
    finally:
        close = getattr(items, "close", None)
        if close:
            close()
