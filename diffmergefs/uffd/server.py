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
from typing import TypeVar

from diffmergefs.core.errors import counted
from diffmergefs.system.daemon import Notifier
from diffmergefs.uffd.listener import Listener, status_listener
from diffmergefs.uffd.peer import Peer
from diffmergefs.uffd.status import ANSWERS, Ledger, Status, rendered
from diffmergefs.uffd.vm import Plan, Refused, Unused, Vm

log = logging.getLogger(__name__)

T = TypeVar("T")

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_ASK_SECONDS = 5.0
_PAUSE_SECONDS = 0.2


class Server:
    """Serves the image of `plan` to the VMs that connect to `listener`."""

    def __init__(
        self, plan: Plan, listener: Listener, image: str, notifier: Notifier | None = None
    ) -> None:
        self._plan = plan
        self._listener = listener
        self._notifier = notifier or Notifier()
        self._ledger = Ledger(os.path.abspath(listener.path), image, plan.view.size)
        self._lock = threading.Lock()
        self._vms: set[Vm] = set()

    def serve(self) -> None:
        """Accept VMs until a signal asks for the end; then serve those that are connected.

        SIGTERM, SIGINT and SIGHUP (unless it is ignored) ask for it. A second one ends it at once,
        and whoever is connected then waits for pages for ever. Call this in the main thread.
        """
        with _signals() as (wake, self._wake), status_listener() as asking:
            self._notifier.notify("READY=1", f"STATUS={self._state()}")
            log.info("%s: ready, serving %s", self._listener.path, self._ledger.image)
            poller = select.poll()
            accepting = self._listener.socket
            accepting.setblocking(False)
            for each in (accepting, asking, wake):
                poller.register(each, select.POLLIN)
            while not (self._ledger.stopping and not self._vms):
                ready = {fd for fd, _ in poller.poll()}
                if wake.fileno() in ready:
                    for number in wake.recv(64).replace(b"\0", b""):
                        if self._ledger.stopping:
                            self._end_now(number)
                            return
                        self._stop(number)
                        poller.unregister(accepting)
                        accepting.close()
                elif accepting.fileno() in ready:
                    self._accept()
                if asking.fileno() in ready:
                    with suppress(OSError):  # without descriptors there is no answer
                        connection, _ = asking.accept()
                        self._start(self._answer, connection, connection)
        log.info("%s: no VM is connected any more", self._listener.path)

    def status(self) -> Status:
        """The present status."""
        with self._lock:
            known = sorted(self._vms, key=lambda vm: vm.connected)
            shown = [(served, vm.counters) for vm in known if (served := vm.served())]
            return self._ledger.status(shown)

    def _state(self) -> str:
        vms = counted(len(self._vms), "VM")
        return f"stopping; {vms} connected" if self._ledger.stopping else f"serving {vms}"

    def _accept(self) -> bool:
        # Whether there was a connection.
        try:
            connection, _ = self._listener.socket.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            log.warning("%s: cannot accept: %s", self._listener.path, error)
            time.sleep(_PAUSE_SECONDS)
            return False
        vm = Vm(connection, self._plan)
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
        self._listener.close()
        # Who has connected relies on being served.
        while self._accept():
            pass
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
        if self._plan.recording is not None:
            self._plan.recording.save()


@contextmanager
def _signals() -> Iterator[tuple[socket.socket, socket.socket]]:
    # Their numbers arrive in the first socket, as bytes; others may send NULs through the second.
    numbers = [n for n in _ENDING if signal.getsignal(n) != signal.SIG_IGN]
    before = {n: signal.signal(n, lambda *_: None) for n in numbers}
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    known = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        with reader, writer:
            yield reader, writer
    finally:
        signal.set_wakeup_fd(known)
        for number, handler in before.items():
            signal.signal(number, handler)
