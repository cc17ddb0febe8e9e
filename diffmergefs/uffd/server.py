"""The page server: it accepts VMs, gives each a thread, and ends when it is asked to."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import TypeVar

from diffmergefs.core.errors import counted
from diffmergefs.system.daemon import Notifier
from diffmergefs.uffd.endpoint import Endpoint, News
from diffmergefs.uffd.listener import status_listener
from diffmergefs.uffd.peer import Peer
from diffmergefs.uffd.status import ANSWERS, Ledger, Status, rendered
from diffmergefs.uffd.vm import Refused, Unused, Vm

log = logging.getLogger(__name__)

T = TypeVar("T")

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_ASK_SECONDS = 5.0
_PAUSE_SECONDS = 0.2


class Server:
    """Serves VMs at its endpoints. `path` is where they are, and `image` names what is served.

    `size` is that of the one image, or None. `stopping` is called before it takes no new VMs.
    """

    def __init__(
        self,
        path: str,
        image: str,
        size: int | None,
        notifier: Notifier | None = None,
        stopping: Callable[[], None] = lambda: None,
    ) -> None:
        self._path = path
        self._stopping = stopping
        self._notifier = notifier or Notifier()
        self._ledger = Ledger(os.path.abspath(path), image, size)
        self._lock = threading.Lock()
        self._vms: set[Vm] = set()
        self._endpoints: dict[int, Endpoint] = {}
        self._news: SimpleQueue[News] = SimpleQueue()
        self._woken, self._wake = socket.socketpair()
        self._wake.setblocking(False)

    def change(self, news: News) -> None:
        """Serve these new endpoints too, and those that are gone no more. For any thread.

        Who has connected by then is served on.
        """
        self._news.put(news)
        with suppress(OSError):  # it wakes up anyway
            self._wake.send(b"\0")

    def serve(self) -> None:
        """Accept VMs until a signal asks for the end; then serve those that are connected.

        SIGTERM, SIGINT and SIGHUP (unless it is ignored) ask for it. A second one ends it at once,
        and whoever is connected then waits for pages for ever. Call this in the main thread.
        """
        with self._woken, self._wake, _signals(self._wake), status_listener() as asking:
            self._poller = select.poll()
            for each in (asking, self._woken):
                self._poller.register(each, select.POLLIN)
            self._take_news()
            self._notifier.notify("READY=1", f"STATUS={self._state()}")
            log.info("%s: ready, serving %s", self._path, self._ledger.image)
            while not (self._ledger.stopping and not self._vms):
                ready = {fd for fd, _ in self._poller.poll()}
                if self._woken.fileno() in ready:
                    for number in self._woken.recv(64).replace(b"\0", b""):
                        if self._ledger.stopping:
                            self._end_now(number)
                            return
                        self._stop(number)
                    self._take_news()
                for endpoint in [e for fd, e in self._endpoints.items() if fd in ready]:
                    self._accept(endpoint)
                if asking.fileno() in ready:
                    with suppress(OSError):  # without descriptors there is no answer
                        connection, _ = asking.accept()
                        self._start(self._answer, connection, connection)
        log.info("%s: no VM is connected any more", self._path)

    def _take_news(self) -> None:
        while True:
            try:
                news = self._news.get_nowait()
            except Empty:
                return
            for endpoint in news.added:
                listening = endpoint.listener.socket
                listening.setblocking(False)
                self._endpoints[listening.fileno()] = endpoint
                self._poller.register(listening, select.POLLIN)
            gone = self._endpoints.values() if self._ledger.stopping else news.gone
            for endpoint in list(gone):
                self._leave(endpoint)

    def _leave(self, endpoint: Endpoint) -> None:
        # Who has connected relies on being served.
        endpoint.listener.close()
        while self._accept(endpoint):
            pass
        listening = endpoint.listener.socket
        self._poller.unregister(listening)
        del self._endpoints[listening.fileno()]
        listening.close()

    def status(self) -> Status:
        """The present status."""
        with self._lock:
            known = sorted(self._vms, key=lambda vm: vm.connected)
            shown = [(served, vm.counters) for vm in known if (served := vm.served())]
            return self._ledger.status(shown)

    def _state(self) -> str:
        vms = counted(len(self._vms), "VM")
        return f"stopping; {vms} connected" if self._ledger.stopping else f"serving {vms}"

    def _accept(self, endpoint: Endpoint) -> bool:
        # Whether there was a connection.
        try:
            connection, _ = endpoint.listener.socket.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            log.warning("%s: cannot accept: %s", endpoint.listener.path, error)
            time.sleep(_PAUSE_SECONDS)
            return False
        vm = Vm(connection, endpoint.plan, endpoint.image)
        with self._lock:
            self._vms.add(vm)
        if not self._start(self._run, vm, connection):
            with self._lock:
                self._vms.discard(vm)
                self._ledger.refused += 1
        return True

    def _start(self, run: Callable[[T], None], about: T, connection: socket.socket) -> bool:
        connection.setblocking(True)
        try:
            threading.Thread(target=run, args=(about,), daemon=True).start()
        except RuntimeError as error:
            connection.close()
            log.error("refused: %s", error)
            return False
        return True

    def _run(self, vm: Vm) -> None:
        try:
            vm.run(lambda: self._accepted(vm))
        except Unused:
            log.debug("%s: connected, and sent nothing", vm.peer)
        except Refused as error:
            log.warning("refused: %s", error)
            with self._lock:
                self._ledger.refused += 1
        except Exception:
            log.exception("serving a VM failed: this is a bug")
        finally:
            if vm.accepted:
                log.info("%s: has ended, after %d faults", vm.peer, vm.counters.faults)
            with self._lock:
                self._vms.discard(vm)
                self._ledger.ended.add(vm.counters)
                self._ledger.failed += vm.problem is not None
            self._notifier.notify(f"STATUS={self._state()}")
            with suppress(OSError):
                self._wake.send(b"\0")

    def _accepted(self, vm: Vm) -> None:
        with self._lock:
            self._ledger.accepted += 1
        log.info("%s: connected", vm.peer)
        self._notifier.notify(f"STATUS={self._state()}")

    def _answer(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(_ASK_SECONDS)
            if Peer.of(connection).uid not in (0, os.geteuid()):
                return
            what = connection.recv(64).decode("ascii", "replace").strip()
            if what in ANSWERS:
                connection.sendall(rendered(what, self.status()))

    def _stop(self, number: int) -> None:
        self._stopping()
        for endpoint in list(self._endpoints.values()):
            self._leave(endpoint)
        with self._lock:
            self._ledger.stopping = True
            left = len(self._vms)
        self._notifier.notify("STOPPING=1", f"STATUS={self._state()}")
        log.info(
            "%s: takes no new VMs, %s connected; serving until the last has ended",
            signal.Signals(number).name,
            counted(left, "VM"),
        )

    def _end_now(self, number: int) -> None:
        log.warning(
            "%s again: ending at once; %s that is not served any more hangs",
            signal.Signals(number).name,
            counted(len(self._vms), "VM"),
        )
        with self._lock:
            plans = {id(vm.plan): vm.plan for vm in self._vms}
        for plan in plans.values():
            if plan is not None and plan.recording is not None:
                plan.recording.save()


@contextmanager
def _signals(wake: socket.socket) -> Iterator[None]:
    # Their numbers arrive at the other end, as bytes; others may send NULs.
    numbers = [n for n in _ENDING if signal.getsignal(n) != signal.SIG_IGN]
    before = {n: signal.signal(n, lambda *_: None) for n in numbers}
    known = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(known)
        for number, handler in before.items():
            signal.signal(number, handler)
