"""A background thread that keeps the next results of a function ready."""

import queue
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

_ITEM, _END, _ERROR = range(3)


class Prefetcher:
    """Iterates over `fetch(item) for item in items`, in order, up to `depth` results ahead of the consumer.

    An exception of `fetch` or `items` is raised where its result would have come. `close()`, the end of a `with`, or
    dropping the object ends the thread; it finishes at most the fetch that it is in.
    """

    def __init__(self, fetch: Callable[[Any], Any], items: Iterable[Any], depth: int = 2):
        self._ready: queue.Queue = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        # The thread knows the queue and the event, not this object: it must not keep an abandoned one alive.
        args = (fetch, items, self._ready, self._stop)
        self._thread = threading.Thread(target=_produce, args=args, daemon=True, name="prefetch")
        self._finalizer = weakref.finalize(self, _end, self._ready, self._stop)
        self._thread.start()

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> Any:
        if self._stop.is_set():
            raise StopIteration
        kind, value = self._ready.get()
        if kind == _ITEM:
            return value
        self.close()
        if kind == _ERROR:
            raise value
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._finalizer()
        self._thread.join()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _produce(
    fetch: Callable[[Any], Any], items: Iterable[Any], ready: queue.Queue, stop: threading.Event
) -> None:
    try:
        for item in items:
            if stop.is_set():
                return
            _put(ready, (_ITEM, fetch(item)), stop)
        _put(ready, (_END, None), stop)
    except BaseException as error:
        _put(ready, (_ERROR, error), stop)


def _put(ready: queue.Queue, entry: tuple[int, Any], stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            ready.put(entry, timeout=0.5)
            return
        except queue.Full:
            continue


def _end(ready: queue.Queue, stop: threading.Event) -> None:
    stop.set()
    while True:  # room for a blocked put, which then sees the event
        try:
            ready.get_nowait()
        except queue.Empty:
            return
