"""Work that several callers need at the same time is done once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError, Future
from typing import Generic, TypeVar

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """Runs work once for each key, however many callers ask for it while it is running.

    All of them get its result, or its error. Nothing is kept: a later call runs the work again, so
    the work itself must first check whether its result is known by then. If the work is interrupted
    (for instance by KeyboardInterrupt), or given up before it starts, there is neither result nor
    error, and one of the waiting callers runs it. Safe for several threads; the work must not ask
    for its own key.
    """

    def __init__(self) -> None:
        self._running: dict[Hashable, Future[T]] = {}
        self._guard = threading.Lock()

    def do(self, key: Hashable, work: Callable[[], T]) -> T:
        """The result of `work`, or its error. Calls it, or waits for the call that is running."""
        while True:
            future, is_mine = self.join(key)
            try:
                if is_mine:
                    self.lead(key, future, work)
                return future.result()
            except CancelledError:
                continue
            finally:
                del future  # the error refers to this frame, which must not refer to the error

    def join(self, key: Hashable) -> tuple[Future[T], bool]:
        """The future outcome, and whether the caller must make sure that `lead` is called.

        For callers that must not block. If the future raises CancelledError, call `join` again.
        """
        with self._guard:
            is_new = key not in self._running
            return self._running.setdefault(key, Future()), is_new

    def lead(self, key: Hashable, future: Future[T], work: Callable[[], T]) -> None:
        """Do the work after a `join` that made the caller its leader; errors go into `future`.

        Raises only what is not an Exception. Does nothing if the work was given up before.
        """
        try:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = work()
            finally:
                # Before the outcome is set: a caller that has it and asks again must start new
                # work.
                with self._guard:
                    del self._running[key]
        except Exception as error:
            future.set_exception(error)
        except BaseException:
            future.set_exception(CancelledError())
            raise
        else:
            future.set_result(result)
        finally:
            del future

    def give_up(self, key: Hashable, future: Future[T]) -> None:
        """Leave the work to another caller, unless `lead` has started it."""
        with self._guard:
            if future.cancel() and self._running.get(key) is future:
                del self._running[key]
