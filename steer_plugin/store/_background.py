"""Work in one thread behind a bounded queue: memory stays flat, errors come up where the next piece is handed over."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Background(Generic[Item]):
    """Calls `work` on one item after another; at most `bound` of them are under way, 0 for the caller's own thread.

    After an error no later item is begun until `take_back`. The thread starts with the first item.
    """

    def __init__(self, work: Callable[[Item], None], bound: int) -> None:
        self._work, self._bound = work, bound
        self._items: deque[Item] = deque()
        self._futures: deque[Future[None]] = deque()
        self._failed: BaseException | None = None
        self._thread = ThreadPoolExecutor(1, "steer-plugin-store")

    def make_room(self) -> None:
        """Wait until one more item may be put; raises what the work raised."""
        while len(self._futures) >= max(self._bound, 1):
            self._settle()

    def put(self, item: Item) -> None:
        """Hand over one item; raises what the work on this or an earlier one raised."""
        self.make_room()
        # Kept before it is handed over: wherever an interrupt strikes, `take_back` returns it.
        self._items.append(item)
        if self._bound:
            self._futures.append(self._thread.submit(self._run, item))
        else:
            self._work(item)
            self._items.popleft()

    def check(self) -> None:
        """Raise what the work raised, without waiting."""
        while self._futures and self._futures[0].done():
            self._settle()

    def wait(self) -> None:
        """Wait until all is done; raises what the work raised."""
        while self._futures:
            self._settle()

    def take_back(self) -> list[Item]:
        """Let the item under way end, and return what was put since the last that is known to be done."""
        for future in self._futures:
            future.cancel()
        wait_for(self._futures)
        items = list(self._items)
        self._failed = None
        self._futures.clear()
        self._items.clear()
        return items

    def stop(self) -> None:
        """End the thread, which drops what it has not begun."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _settle(self) -> None:
        self._futures[0].result()
        self._futures.popleft()
        self._items.popleft()

    def _run(self, item: Item) -> None:
        if self._failed is not None:
            raise self._failed
        try:
            self._work(item)
        except BaseException as error:
            self._failed = error
            raise
