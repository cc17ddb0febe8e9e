"""The end of a mount: signals, detaching, and what the service manager gets."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest
import trio
import trio.testing

from diffmergefs.fuse import lifecycle
from diffmergefs.fuse.lifecycle import STOP_SECONDS, Lifecycle, deferred_signals
from diffmergefs.system.board import Board
from diffmergefs.system.line import SIGNAL, Line, received

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class FakeMount:
    """Stands in for an OwnMount.

    `obstacles` are what is in the way of the next attempts to detach it. It is shown until it is
    detached; then the kernel knows it for `known` more questions.
    """

    device, source = "0:9", "/store"

    def __init__(self, *obstacles: str, others: tuple[str, ...] = (), known: float = 0) -> None:
        self.obstacles = list(obstacles)
        self.others = list(others)
        self.shown = True
        self.known = known

    def obstacle(self) -> str:
        return self.obstacles[0] if self.obstacles else ""

    def detach(self) -> str:
        if self.obstacles:
            return self.obstacles.pop(0)
        self.shown = False
        return ""

    def is_shown(self) -> bool:
        return self.shown

    def is_known(self) -> bool:
        self.known -= 1
        return self.known >= 0

    def elsewhere(self) -> list[str]:
        return self.others


class Mounted:
    """A lifecycle with everything around it, and what it did.

    The keeper at the other end of its line lives until `leave`.
    """

    def __init__(self, own: FakeMount | None, *, tags: int | None = 2) -> None:
        self._sent: list[str] = []
        self.stopped: list[float] = []
        self.own = own
        store = None if tags is None else SimpleNamespace(tags=lambda: ["tag"] * tags)
        self.operations = SimpleNamespace(
            open_files=1,
            tree=SimpleNamespace(store=store),
            observer=SimpleNamespace(stop=self.stopped.append),
        )
        self._keeper, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._line = Line(
            number=1,
            signals=(),
            held={},
            suspects=frozenset(),
            poisoned={},
            reason="",
            dump="",
            board=Board(),
            end=end,
        )
        self._line.keeper = os.getppid()
        operations: Any = self.operations
        mount: Any = own
        self.lifecycle = Lifecycle(operations, mount, self._line)

    def close(self) -> None:
        self._keeper.close()
        self._line.end.close()

    @property
    def sent(self) -> list[str]:
        """What the service manager is to know."""
        with suppress(BlockingIOError):
            while message := received(self._keeper)[0]:
                assert message[:1] == b"T"
                self._sent.append(message[1:].decode())
        return self._sent

    def signal(self, number: int) -> None:
        """Have the keeper pass on a signal."""
        self._keeper.send(bytes([SIGNAL, number]))

    def leave(self) -> None:
        """The keeper dies."""
        self._line.keeper = 0
        self._keeper.close()

    def run(self, *early: int, then: Callable[[], Awaitable[object]] | None = None) -> bool:
        """Watch signals; `early` came before. Whether the second signal ended it."""

        async def main() -> bool:
            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    await nursery.start(self.lifecycle.watch_signals, nursery, early)
                    if then is not None:
                        await trio.testing.wait_all_tasks_blocked()  # the signals have handlers
                        await then()
                        nursery.cancel_scope.cancel()
                        return False
            return nursery.cancel_scope.cancel_called

        return trio.run(main)


@pytest.fixture
def mount_of() -> Iterator[Callable[..., Mounted]]:
    made: list[Mounted] = []

    def make(own: FakeMount | None, *, tags: int | None = 2) -> Mounted:
        made.append(Mounted(own, tags=tags))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """It polls without a pause; a test that ran a command may have turned the log off."""
    monkeypatch.setattr(lifecycle, "_POLL_SECONDS", 0.001)
    monkeypatch.setattr(lifecycle, "in_other_namespaces", lambda device, source: [])
    monkeypatch.setattr(logging.getLogger("diffmergefs"), "propagate", True)


@pytest.fixture
def terminated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whether pyfuse3 was told to end."""
    found: list[str] = []
    monkeypatch.setattr(pyfuse3, "terminate", lambda: found.append("terminate"))
    return found


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged so far."""
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records]


async def until(answer: Callable[[], object]) -> None:
    while not answer():
        await trio.sleep(0.001)


# Signals


def test_signals_wait_in_a_list_and_their_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in ENDING]
    with deferred_signals() as received:
        for number in ENDING:
            os.kill(os.getpid(), number)
        assert received == list(ENDING)
    assert [signal.getsignal(number) for number in ENDING] == before


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    """As nohup(1) has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with deferred_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            assert received == []
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", ENDING)
def test_the_first_signal_detaches_and_it_is_served_on(
    mount_of: Callable[..., Mounted],
    number: signal.Signals,
    log: Callable[[], list[str]],
    terminated: list[str],
) -> None:
    mount = mount_of(own := FakeMount())

    async def then() -> None:
        mount.signal(number)
        await until(lambda: not own.shown)

    assert not mount.run(then=then)
    assert log() == [f"{number.name}: detached; 1 file is open; serving until the last is closed"]
    assert mount.sent == [
        "STOPPING=1\nSTATUS=detached; 1 file open, serving until the last is closed"
    ]
    assert (mount.stopped, terminated) == ([], [])


def test_the_second_signal_ends_it_at_once_whatever_the_first_could_do(
    mount_of: Callable[..., Mounted], log: Callable[[], list[str]], terminated: list[str]
) -> None:
    mount = mount_of(FakeMount(*["covered"] * 100_000))
    assert mount.run(signal.SIGTERM, signal.SIGINT)
    assert "SIGINT again: ending at once, 1 file is open" in log()
    assert (mount.stopped, terminated) == ([STOP_SECONDS], ["terminate"])


def test_without_a_mount_table_it_ends_only_at_the_second_signal(
    mount_of: Callable[..., Mounted], terminated: list[str]
) -> None:
    mount = mount_of(None)
    assert mount.run(signal.SIGTERM, signal.SIGINT)
    assert terminated == ["terminate"]
    assert mount.sent[0].startswith("STOPPING=1\nSTATUS=detached; 1 file open")


def test_it_is_detached_once_nothing_covers_it_and_each_obstacle_is_logged_once(
    mount_of: Callable[..., Mounted], log: Callable[[], list[str]]
) -> None:
    mount = mount_of(own := FakeMount("a tmpfs covers it", "a tmpfs covers it", "no memory"))

    async def then() -> None:
        await until(lambda: not own.shown)

    mount.run(signal.SIGTERM, then=then)
    assert log() == [
        f"SIGTERM: cannot detach: {obstacle}; trying again; 1 file is open; a second signal ends"
        " the mount at once"
        for obstacle in ("a tmpfs covers it", "no memory")
    ]


def test_other_places_of_the_mount_are_named(
    mount_of: Callable[..., Mounted], log: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def elsewhere(device: str, source: str) -> list[str]:
        asked.append((device, source))
        return ["/mnt (in the namespace of process 7)"]

    monkeypatch.setattr(lifecycle, "in_other_namespaces", elsewhere)
    mount = mount_of(FakeMount(others=("/a", "/b")))
    mount.run(signal.SIGTERM, then=lambda: until(lambda: len(log()) == 2))
    assert log() == [
        "SIGTERM: detached; 1 file is open and it is also mounted on /a, /b; serving until the"
        " last is closed and unmounted",
        "SIGTERM: still mounted on /mnt (in the namespace of process 7); serving until that is"
        " unmounted",
    ]
    assert asked == [("0:9", "/store")]
    text = "detached; 1 file and 2 other mounts open, serving until the last is closed"
    assert mount.sent == [f"STOPPING=1\nSTATUS={text}"]


def test_a_signal_that_both_processes_get_counts_once(
    mount_of: Callable[..., Mounted], terminated: list[str]
) -> None:
    """A terminal sends one to each. The keeper passes on its own."""
    mount = mount_of(own := FakeMount())

    async def then() -> None:
        for number in ENDING:
            os.kill(os.getpid(), number)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert own.shown and not mount.sent
        mount.signal(signal.SIGTERM)
        await until(lambda: not own.shown)

    assert not mount.run(then=then)
    assert not terminated


def test_without_a_keeper_its_own_signals_count(
    mount_of: Callable[..., Mounted], log: Callable[[], list[str]], terminated: list[str]
) -> None:
    mount = mount_of(own := FakeMount())
    mount.lifecycle.is_ready = True

    async def then() -> None:
        mount.leave()
        await until(lambda: len(log()) == 1)
        assert own.shown
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: not own.shown)
        os.kill(os.getpid(), signal.SIGINT)
        await trio.sleep_forever()

    assert mount.run(then=then)
    assert log()[0] == "the keeper is gone: if this server dies too, the mount dies with it"
    assert terminated == ["terminate"]


def test_a_server_ends_at_once_if_its_keeper_dies_before_the_mount_is_ready(
    mount_of: Callable[..., Mounted], terminated: list[str]
) -> None:
    """Nobody knows of that mount."""
    mount = mount_of(FakeMount())

    async def then() -> None:
        mount.leave()
        await trio.sleep_forever()

    assert mount.run(then=then)
    assert terminated == ["terminate"]


# The status


@pytest.mark.parametrize(
    ("tags", "images"), [(2, "2 snapshots"), (1, "1 snapshot"), (None, "one image")]
)
def test_a_service_manager_gets_the_status_when_it_changes(
    mount_of: Callable[..., Mounted], tags: int | None, images: str
) -> None:
    mount = mount_of(FakeMount(), tags=tags)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mount.lifecycle.report_status)
            await until(lambda: mount.sent)
            mount.operations.open_files = 3
            await until(lambda: len(mount.sent) > 1)
            for _ in range(20):  # nothing has changed
                await trio.sleep(0.001)
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert mount.sent == [f"STATUS=serving {images}, {n} open" for n in ("1 file", "3 files")]


# A connection that was cut off


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        (None, 1, False),  # unknown
        (FakeMount(), 0, True),  # still shown
        (FakeMount(known=3), 1, False),  # the kernel frees it once its users are gone
        (FakeMount(known=1e9), 1, True),
        (FakeMount(known=1e9), 0, False),
    ],
    ids=["no table", "shown", "freed soon", "kept", "kept, nothing open"],
)
def test_a_connection_was_cut_off_if_the_kernel_keeps_the_mount(
    mount_of: Callable[..., Mounted], own: FakeMount | None, files: int, expected: bool
) -> None:
    if own is not None and own.known:
        own.detach()
    mount = mount_of(own)
    mount.operations.open_files = files
    assert (
        trio.run(mount.lifecycle.was_cut_off, clock=trio.testing.MockClock(autojump_threshold=0))
        is expected
    )


def test_an_end_of_our_own_is_no_cut(
    mount_of: Callable[..., Mounted], terminated: list[str]
) -> None:
    mount = mount_of(FakeMount())
    assert mount.run(signal.SIGTERM, signal.SIGINT)
    mount.own.shown = True  # type: ignore[union-attr]
    assert trio.run(mount.lifecycle.was_cut_off) is False
