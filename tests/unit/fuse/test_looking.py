"""Looks at a mount's source follow each other, whatever happens in one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from diffmergefs.core.errors import FileAccessError
from diffmergefs.fuse import looking
from diffmergefs.fuse.looking import watch_source
from diffmergefs.fuse.served import Store
from diffmergefs.opening.trust import TrustPolicy
from tests.support.live import until
from tests.support.stores import OLD_NS, SECOND_NS, write_chain


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store with two tags, of which no scan was made yet."""
    root = write_chain(tmp_path / "store", ["base", "leaf"])
    found = Store(str(root), TrustPolicy(), clock=lambda: OLD_NS + 100 * SECOND_NS)
    yield found
    found.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scans follow each other at once; a test that ran a command may have turned the log off."""
    monkeypatch.setattr(looking, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr(logging.getLogger("diffmergefs"), "propagate", True)


def watched(
    store: Store, monkeypatch: pytest.MonkeyPatch, looks: list[Callable[[], object]]
) -> None:
    """Scan until all these looks were made, one after the other."""
    done = threading.Event()

    def look() -> set[str]:
        if not looks:
            done.set()
            return set()
        looks.pop(0)()
        return set()

    monkeypatch.setattr(store, "look", look)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch_source, store)
            assert await trio.to_thread.run_sync(done.wait, 60)
            nursery.cancel_scope.cancel()

    trio.run(main)


def failing(error: Exception) -> Callable[[], object]:
    def look() -> None:
        raise error

    return look


def test_a_scan_that_fails_is_logged_once_and_the_next_one_follows(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gone, other = (FileAccessError(text) for text in ("gone", "unreadable"))
    real = store.look
    looks = [failing(gone), failing(gone), real, failing(gone), failing(other), failing(other)]
    watched(store, monkeypatch, looks)
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert warnings == [
        f"the mount {effect} until this is fixed: {reason}"
        for effect, reason in (
            ("shows nothing", "gone"),
            ("stays as it was", "gone"),
            ("stays as it was", "unreadable"),
        )
    ]


def test_a_bug_in_a_scan_is_logged_and_the_next_one_follows(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    watched(store, monkeypatch, [failing(RuntimeError("on purpose")), store.look])
    (record,) = (r for r in caplog.records if r.levelno >= logging.WARNING)
    assert record.getMessage() == "scanning the source failed: this is a bug"
    assert record.exc_info and sorted(store.tags()) == ["base", "leaf"]


def test_a_slow_scan_is_logged(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(looking, "SLOW_SECONDS", 0.01)

    def logged(text: str) -> bool:
        return any(f"{store.root}: {text}" in record.getMessage() for record in caplog.records)

    def slow() -> None:
        until(lambda: logged("scanning it takes longer than 0.01 s"), "it is not logged")
        assert not logged("scanning it took")

    watched(store, monkeypatch, [slow])
    assert logged("scanning it took")
