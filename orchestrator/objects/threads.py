"""Work in threads that Ctrl-C does not wait for."""

import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def for_each(items: Iterable[T], work: Callable[[T], object], threads: int) -> None:
    """Call `work` with each item, in threads. After an error, no other item is begun.

    KeyboardInterrupt is raised at once. The threads end with the process: unlike those of
    `concurrent.futures`, which would first finish their items, for hours if the objects are large.

    Raises:
        Exception: The first error of `work`.
    """
    waiting = list(items)[::-1]
    errors: list[Exception] = []

    def run() -> None:
        while not errors:
            try:
                item = waiting.pop()
            except IndexError:
                return
            try:
                work(item)
            except Exception as error:
                errors.append(error)

    started = [threading.Thread(target=run, daemon=True) for _ in range(min(threads, len(waiting)))]
    for thread in started:
        thread.start()
    try:
        for thread in started:
            thread.join()
    except BaseException:
        waiting.clear()
        raise
    if errors:
        raise errors[0]
