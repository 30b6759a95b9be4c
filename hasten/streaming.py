"""Yield what a running call finds while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from queue import SimpleQueue
from threading import Thread
from typing import Any


def streamed(
    execute: Callable[[Callable[[Any], None]], None], cancel: Callable[[], None]
) -> Iterator[Any]:
    """Run `execute(put)` in a thread, and yield what it puts, in order, as soon as it is there.

    Its error is raised at the reader. A reader who leaves early makes `cancel` be called.
    """
    queue: SimpleQueue[tuple[str, Any]] = SimpleQueue()

    def work() -> None:
        try:
            execute(lambda item: queue.put(("item", item)))
            queue.put(("end", None))
        except BaseException as error:
            queue.put(("error", error))

    Thread(target=work, daemon=True).start()
    try:
        while (found := queue.get())[0] == "item":
            yield found[1]
        if found[0] == "error":
            raise found[1]
    finally:
        cancel()
