"""A mount's options, why it cannot be made, and the scans of its source."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pyfuse3
import pytest
import trio

from diffmergefs.core.errors import FileAccessError, MountFailedError
from diffmergefs.fuse import session
from diffmergefs.fuse.served import Store
from diffmergefs.fuse.session import (
    Session,
    session_options,
    wait_until_stable,
    watch_source,
)
from diffmergefs.fuse.tree import Tree
from diffmergefs.opening.trust import TrustPolicy
from tests.support.live import until
from tests.support.stores import OLD_NS, SECOND_NS, write_chain

# Options


def options(*extra: str, source: str = "/store", **given: bool) -> set[str]:
    return session_options(source, extra, **({"allow_other": False, "open_rw": False} | given))


def test_a_session_is_read_only_unless_programs_open_files_for_writing() -> None:
    always = {"fsname=/store", "subtype=diffmergefs", "default_permissions"}
    always |= {"nosuid", "nodev", "noexec"}
    assert options() == {*always, "ro"}
    assert options(open_rw=True) == always
    assert options(allow_other=True) == {*always, "ro", "allow_other"}
    assert options("noatime", "x=y") == {*always, "ro", "noatime", "x=y"}


def test_a_comma_and_a_backslash_of_a_source_or_a_value_are_escaped() -> None:
    assert "fsname=/a\\,b\\\\c" in options(source="/a,b\\c")
    assert 'context="a:c1\\,c2"' in options('context="a:c1,c2"')


# A mount that cannot be made


def refused(
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    *options: str,
    obstacles: list[str],
    said: str = "",
) -> str:
    """The error of a session for which libfuse cannot mount."""
    given: list[bytes] = []

    def init(operations: object, mountpoint: str, options: set[str]) -> None:
        given.extend(sorted(option.encode() for option in options))
        os.write(2, said.encode())
        raise RuntimeError("fuse_session_mount failed")

    monkeypatch.setattr(pyfuse3, "init", init)
    monkeypatch.setattr(session, "obstacles", lambda: obstacles)
    made = Session(
        tree=Tree("/mnt", store), mountpoint="/mnt", options={*options}, ready=lambda: None
    )
    with pytest.raises(MountFailedError) as caught:
        made.serve()
    assert given == sorted(map(os.fsencode, options))
    return str(caught.value)


def test_it_says_what_is_in_the_way(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    found = refused(store, monkeypatch, "ro", obstacles=["no /dev/fuse", "no fusermount3"])
    assert found == "/mnt: cannot be mounted: no /dev/fuse; no fusermount3"
    found = refused(store, monkeypatch, "fsname=/a\udcff", obstacles=[])
    assert found == (
        "/mnt: cannot be mounted: fuse_session_mount failed; `diffmergefs doctor` shows what"
        " mounting needs"
    )


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("noise\nfuse: mount failed: Too many users\n", "fuse: mount failed: Too many users; "),
        ("fusermount3: user has no write access to mountpoint /mnt\n", "; mount on a directory"),
        ("fusermount3: mountpoint /mnt not owned by user\n", "; mount on a directory that this"),
    ],
)
def test_what_libfuse_says_is_the_cause_and_goes_nowhere_else(
    said: str,
    text: str,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    found = refused(store, monkeypatch, obstacles=[], said=said)
    cause = said.splitlines()[-1]
    assert found.startswith(f"/mnt: cannot be mounted: {cause}; ") and text in found
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("user", "may", "is_the_reason"), [(1000, False, True), (1000, True, False), (0, False, False)]
)
def test_an_ordinary_user_may_lack_the_permission_to_let_others_in(
    user: int, may: bool, is_the_reason: bool, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(session, "others_may_be_let_in", lambda: may)
    found = refused(store, monkeypatch, "allow_other", obstacles=["another reason"])
    line = (
        "/mnt: cannot be mounted: --allow-other needs the line user_allow_other in /etc/fuse.conf"
    )
    assert found.startswith(line) == is_the_reason
    assert ("another reason" in found) != is_the_reason


# The end


def test_no_alarm_rings_when_trio_ends(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal in that moment makes Python print a traceback: trio has closed its socket."""
    timers = []

    async def main(max_tasks: int) -> None:
        request, client = os.pipe()
        os.write(client, b"x")
        await pyfuse3.trio.lowlevel.wait_readable(request)  # type: ignore[attr-defined]
        timers.append(signal.getitimer(signal.ITIMER_REAL)[1])
        os.close(request)
        os.close(client)

    def close(unmount: bool) -> None:
        timers.append(signal.getitimer(signal.ITIMER_REAL)[1])

    monkeypatch.setattr(pyfuse3, "init", lambda *_: None)
    monkeypatch.setattr(pyfuse3, "main", main)
    monkeypatch.setattr(pyfuse3, "close", close)
    made = Session(tree=Tree("/mnt", store), mountpoint="/mnt", options=set(), ready=lambda: None)
    with suppress(MountFailedError):
        made.serve()
    during, after = timers
    assert during > 0 and after == 0


# Scans of the source


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
    monkeypatch.setattr(session, "LOOK_SECONDS", 0.001)
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


def test_what_is_fresh_is_looked_at_twice_before_it_is_shown(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[set[str]] = [{"leaf"}, set(), set()]
    monkeypatch.setattr(store, "look", lambda: looks.pop(0))
    wait_until_stable(store)
    assert len(looks) == 1
    wait_until_stable(store)
    assert looks == []


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
    monkeypatch.setattr(session, "SLOW_SECONDS", 0.01)

    def logged(text: str) -> bool:
        return any(f"{store.root}: {text}" in record.getMessage() for record in caplog.records)

    def slow() -> None:
        until(lambda: logged("scanning it takes longer than 0.01 s"), "it is not logged")
        assert not logged("scanning it took")

    watched(store, monkeypatch, [slow])
    assert logged("scanning it took")


def test_it_loads_beforehand_what_reads_seals() -> None:
    """Its daemon may meet the first seal when the package was upgraded, or is gone."""
    name = "diffmergefs.sidecars.bmapreader"
    code = f"import sys, diffmergefs.fuse.session; print({name!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
