"""The keeper of a mount, and a server's event loop."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pyfuse3
import pytest
import trio

from diffmergefs.core.errors import MountAbortedError
from diffmergefs.fuse import session
from diffmergefs.fuse.served import Store
from diffmergefs.fuse.session import (
    Session,
)
from diffmergefs.fuse.tree import Tree
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.system.board import Board
from diffmergefs.system.line import READY, Line, received
from tests.support.logged import warnings
from tests.support.stores import OLD_NS, SECOND_NS, write_chain

# The keeper, and a server


class Kept:
    """A keeper that runs one server, in this process, and returns what that said last.

    With `words` it returns these instead.
    """

    given: ClassVar[dict[str, Any]] = {}
    words: ClassVar[list[bytes | None]] = []
    number, reason, dump = 1, "it was killed", ""

    def __init__(self, **given: Any) -> None:
        self.board, self.covers = Board(), given["covers"]
        Kept.given = given

    def run(self) -> bytes | None:
        if Kept.words:
            return Kept.words.pop()
        keeper, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with keeper, end:
            line = Line(
                number=Kept.number,
                signals=(),
                held={},
                suspects=frozenset(),
                poisoned={},
                reason=self.reason,
                dump=Kept.dump,
                board=self.board,
                end=end,
            )
            found: bytes = Kept.given["serve"](line)
            while received(keeper)[0] != bytes([READY]):
                pass
            return found


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Mounts are made of nothing; what is done to them."""
    done: list[object] = []

    class Device:
        resends = False

        def __init__(self, others: set[int]) -> None:
            pass

        def begin(self, board: Board, *, resend: bool) -> SimpleNamespace:
            return SimpleNamespace(finish=lambda: done.append(f"resend={resend}"))

    monkeypatch.setattr(session, "Device", Device)
    monkeypatch.setattr(session, "Keeper", Kept)
    monkeypatch.setattr(Kept, "words", [])
    monkeypatch.setattr(Kept, "number", 1)
    monkeypatch.setattr(Kept, "dump", "")
    monkeypatch.setattr(pyfuse3, "init", lambda *_: None)
    monkeypatch.setattr(pyfuse3, "close", lambda unmount: done.append("close"))
    return done


def serving(
    store: Store, patch: pytest.MonkeyPatch, main: Callable[[], Awaitable[object]], **given: Any
) -> Session:
    """A session whose requests are what `main` does."""
    fields: dict[str, Any] = {"ready": lambda: None} | given
    made = Session(tree=Tree("/mnt", store), mountpoint="/mnt", options=set(), **fields)

    async def requests(max_tasks: int) -> None:
        await main()

    patch.setattr(pyfuse3, "main", requests)
    return made


async def wait_for_request() -> None:
    """As pyfuse3 waits for one, which comes at once."""
    request, client = os.pipe()
    os.write(client, b"x")
    try:
        await pyfuse3.trio.lowlevel.wait_readable(request)  # type: ignore[attr-defined]
    finally:
        os.close(request)
        os.close(client)


def test_the_keeper_gets_what_it_needs(
    store: Store, kept: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, ...]] = []
    notifier: Any = SimpleNamespace(notify=lambda *lines: told.append(lines))
    ready: list[str] = []
    made = serving(
        store,
        monkeypatch,
        wait_for_request,
        notifier=notifier,
        watchdog=30.0,
        ready=lambda: ready.append("ready"),
    )
    made.serve()
    assert (Kept.given["watchdog"], Kept.given["covers"]) == (30.0, False)
    Kept.given["ready"]()
    Kept.given["tell"]("STOPPING=1\nSTATUS=x")
    assert (ready, told[-1]) == (["ready"], ("STOPPING=1", "STATUS=x"))
    assert kept == ["close"]


@pytest.mark.parametrize("number", [1, 2])
def test_a_server_reads_its_first_request_from_the_keeper(
    number: int, store: Store, kept: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Kept, "number", number)

    async def main() -> None:
        # INIT is there without a wait; only then the device may be waited for.
        await pyfuse3.trio.lowlevel.wait_readable(-1)  # type: ignore[attr-defined]
        assert not kept
        await wait_for_request()
        assert kept == [f"resend={number > 1}"]

    serving(store, monkeypatch, main).serve()
    assert kept == [f"resend={number > 1}", "close"]


@pytest.mark.parametrize("number", [1, 2])
def test_a_server_that_answers_says_so(
    number: int,
    store: Store,
    kept: list[object],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Kept, "number", number)
    monkeypatch.setattr(Kept, "dump", "File x, line 1\nFile y, line 2" if number > 1 else "")
    caplog.set_level(logging.INFO)
    left = trio.Event()

    async def main() -> None:
        await wait_for_request()
        operations.init()
        await left.wait()

    made = serving(store, monkeypatch, main, leave_caller=left.set)
    operations = made._operations
    made.serve()
    first = "this kernel keeps no requests for another server (Linux 6.9 does): if this server dies"
    expected = {
        1: ["ready", f"{first}, the mount ends"],
        2: ["server 2 took over: it was killed", "what the last server did"],
    }
    found = [(r.levelno, r.getMessage()) for r in caplog.records if r.name == session.log.name]
    assert [text for _, text in found] == expected[number]
    assert found[0][0] == (logging.INFO if number == 1 else logging.WARNING)
    if number > 1:
        (record,) = (r for r in caplog.records if r.exc_text)
        assert record.exc_text == "    File x, line 1\n    File y, line 2"


def test_a_keeper_that_gives_up_is_an_error_that_the_log_has(
    store: Store,
    kept: list[object],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    Kept.words.append(None)
    with pytest.raises(MountAbortedError, match=r"it was killed.*no other can go on") as caught:
        serving(store, monkeypatch, wait_for_request).serve()
    assert warnings(caplog) == [str(caught.value)]
    Kept.words.append(b"cut off")
    with pytest.raises(MountAbortedError, match="ended from outside"):
        serving(store, monkeypatch, wait_for_request).serve()


def test_after_a_second_signal_it_is_no_error_that_no_server_goes_on(
    store: Store, kept: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(keeper: Kept) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Kept, "run", run)
    serving(store, monkeypatch, wait_for_request).serve()
    assert Kept.given["signals"] == [signal.SIGTERM, signal.SIGINT]


def test_no_alarm_rings_when_trio_ends(
    store: Store, kept: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal in that moment makes Python print a traceback: trio has closed its socket."""
    timers = []

    async def main() -> None:
        await wait_for_request()  # INIT
        await wait_for_request()
        timers.append(signal.getitimer(signal.ITIMER_REAL)[1])

    def close(unmount: bool) -> None:
        timers.append(signal.getitimer(signal.ITIMER_REAL)[1])

    made = serving(store, monkeypatch, main)
    monkeypatch.setattr(pyfuse3, "close", close)
    made.serve()
    during, after = timers
    assert during > 0 and after == 0


# What tests use


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store with two tags, of which no scan was made yet."""
    root = write_chain(tmp_path / "store", ["base", "leaf"])
    found = Store(str(root), TrustPolicy(), clock=lambda: OLD_NS + 100 * SECOND_NS)
    yield found
    found.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that ran a command may have turned the log off."""
    monkeypatch.setattr(logging.getLogger("diffmergefs"), "propagate", True)


def test_it_loads_beforehand_what_reads_seals() -> None:
    """Its daemon may meet the first seal when the package was upgraded, or is gone."""
    name = "diffmergefs.sidecars.bmapreader"
    code = f"import sys, diffmergefs.fuse.session; print({name!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
