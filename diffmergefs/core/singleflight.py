"""Doing once what several want at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError, Future
from typing import Generic, TypeVar

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """Work that is done once for each key, however many ask for it while it is under way.

    All of them get what it gives, or its error. Nothing is remembered: whoever asks after its end
    has it done again, so the work itself must look first whether its result is known by then. One
    that is interrupted (by KeyboardInterrupt, for instance) or given up before it began has neither
    result nor error: one of those who wait does it then. Safe for several threads; the work must
    not ask for its own key.
    """

    def __init__(self) -> None:
        self._running: dict[Hashable, Future[T]] = {}
        self._guard = threading.Lock()

    def do(self, key: Hashable, work: Callable[[], T]) -> T:
        """What `work` gives or raises; called here, or waited for where it is under way already."""
        while True:
            future, is_mine = self.join(key)
            try:
                if is_mine:
                    self.lead(key, future, work)
                return future.result()
            except CancelledError:
                continue
            finally:
                del future  # an error holds this frame, which must not hold the error

    def join(self, key: Hashable) -> tuple[Future[T], bool]:
        """Where the outcome will be, and whether the caller must see to it that `lead` is called.

        For those who must not block; CancelledError in it means that it is to be asked for anew.
        """
        with self._guard:
            is_new = key not in self._running
            return self._running.setdefault(key, Future()), is_new

    def lead(self, key: Hashable, future: Future[T], work: Callable[[], T]) -> None:
        """Do the work of a `join` that fell to the caller; what it raises goes into `future`.

        Raises only what is no Exception. Does nothing if it was given up before.
        """
        try:
            if not future.set_running_or_notify_cancel():
                return
            result = work()
        except Exception as error:
            self._end(key)
            future.set_exception(error)
        except BaseException:
            self._end(key)
            future.set_exception(CancelledError())
            raise
        else:
            self._end(key)
            future.set_result(result)
        finally:
            del future

    def give_up(self, key: Hashable, future: Future[T]) -> None:
        """Leave to somebody else what fell to the caller, if `lead` has not begun with it."""
        with self._guard:
            if future.cancel() and self._running.get(key) is future:
                del self._running[key]

    def _end(self, key: Hashable) -> None:
        # Before the outcome is told: who has heard of it and asks again must not get it once more.
        with self._guard:
            del self._running[key]
