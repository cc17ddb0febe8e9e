"""What was verified is remembered by identity; nothing planted or damaged is believed."""

from __future__ import annotations

import os
import pwd
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from diffmergefs.core.identity import FileVersion
from diffmergefs.sidecars import verified
from diffmergefs.sidecars.verified import Identity, Remembered, default_directory
from tests.support.logged import warnings
from tests.support.subjects.verified import CTIME_NS, OLD, VERSION, directory, memory

__all__ = ["directory"]


def test_what_was_remembered_is_recalled_by_a_later_run(directory: Path) -> None:
    memory(directory).remember("sha256", OLD, "ab" * 32)
    assert memory(directory).recall("sha256", OLD) == "ab" * 32
    assert memory(directory).recall("seal", OLD) is None


@pytest.mark.parametrize(
    "other",
    [
        OLD._replace(path="/images/other.mem"),
        OLD._replace(version=VERSION._replace(device=8)),
        OLD._replace(version=VERSION._replace(inode=2**63 + 6)),
        OLD._replace(version=VERSION._replace(size=8192)),
        OLD._replace(version=VERSION._replace(mtime_ns=VERSION.mtime_ns + 1)),
        OLD._replace(version=VERSION._replace(ctime_ns=CTIME_NS + 1)),
    ],
)
def test_each_part_of_the_identity_counts(directory: Path, other: Identity) -> None:
    memory(directory).remember("sha256", OLD, "ab")
    assert memory(directory).recall("sha256", other) is None


def test_identity_says_what_stat_says(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    s = path.stat()
    expected = FileVersion(s.st_dev, s.st_ino, 3, s.st_mtime_ns, s.st_ctime_ns)
    with open(path, "rb") as file:
        assert Identity.of_open(file.fileno()) == (os.path.realpath(path), expected)


def test_a_path_need_not_be_text(directory: Path) -> None:
    odd = OLD._replace(path=os.fsdecode(b"/\xff/\n'"))
    memory(directory).remember("sha256", odd, "ab")
    assert memory(directory).recall("sha256", odd) == "ab"


def test_a_file_just_changed_is_not_remembered(directory: Path) -> None:
    # A store in the same tick of the clock would leave its identity as it is.
    kept = memory(directory)
    kept.remember("sha256", OLD, "ab", since_ns=CTIME_NS + 1_000_000)
    assert kept.recall("sha256", OLD) is None
    kept.remember("sha256", OLD, "ab", since_ns=CTIME_NS + 60_000_000)
    assert kept.recall("sha256", OLD) == "ab"


def test_where_whole_seconds_are_stored_just_now_is_longer() -> None:
    coarse = OLD._replace(version=VERSION._replace(ctime_ns=1_600_000_000_000_000_000))
    assert not coarse.is_final(coarse.version.ctime_ns + 1_900_000_000)
    assert coarse.is_final(coarse.version.ctime_ns + 2_100_000_000)


def test_nothing_is_made_before_there_is_something_to_remember(directory: Path) -> None:
    assert memory(directory).recall("sha256", OLD) is None
    assert not directory.exists()


def test_only_the_user_reads_and_writes_it(directory: Path) -> None:
    before = os.umask(0)
    try:
        memory(directory / "deep").remember("sha256", OLD, "ab")
    finally:
        os.umask(before)
    assert stat.S_IMODE((directory / "deep").stat().st_mode) == 0o700
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (directory / "deep").iterdir()}
    assert modes == {0o600}


@pytest.mark.parametrize("mode", [0o777, 0o720, 0o702])
def test_a_directory_that_others_write_to_is_not_believed(
    directory: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    memory(directory).remember("sha256", OLD, "planted")
    directory.chmod(mode)
    kept = memory(directory)
    assert kept.recall("sha256", OLD) is None
    kept.remember("sha256", OLD, "more")
    [line] = warnings(caplog)
    assert str(directory) in line and f"{mode:04o}" in line and "chmod go-w" in line


def test_a_database_that_others_write_to_is_not_believed(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memory(directory).remember("sha256", OLD, "planted")
    [database] = directory.iterdir()
    database.chmod(0o666)
    assert memory(directory).recall("sha256", OLD) is None
    assert str(database) in warnings(caplog)[0]


def test_a_symlink_to_a_database_is_not_believed(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memory(directory).remember("sha256", OLD, "planted")
    [database] = directory.iterdir()
    database.rename(directory / "elsewhere")
    database.symlink_to("elsewhere")
    assert memory(directory).recall("sha256", OLD) is None
    assert "neither a directory nor a file" in warnings(caplog)[0]


def test_a_damaged_database_is_set_aside_and_a_new_one_begun(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = memory(directory)
    kept.remember("sha256", OLD, "ab")
    [database] = directory.iterdir()
    database.write_bytes(b"no database at all " * 500)
    assert kept.recall("sha256", OLD) is None
    assert [path.name for path in directory.iterdir()] == [f"{database.name}.corrupt"]
    kept.remember("sha256", OLD, "cd")
    assert kept.recall("sha256", OLD) == "cd"
    [line] = warnings(caplog)
    assert "set aside" in line and str(database) in line


def test_damage_in_the_middle_raises_nothing(directory: Path) -> None:
    kept = memory(directory)
    kept.remember("sha256", OLD, "ab")
    [database] = directory.iterdir()
    whole = database.read_bytes()
    for start in range(0, len(whole), 512):
        database.write_bytes(whole[:start] + b"\xa5" * 512 + whole[start + 512 :])
        assert kept.recall("sha256", OLD) in (None, "ab")
        kept.remember("sha256", OLD, "ab")
        database.unlink(missing_ok=True)


@pytest.mark.parametrize("obstacle", ["file in its place", "file above it", "no such parent"])
def test_an_unusable_directory_is_logged_once_and_forgotten(
    directory: Path, obstacle: str, caplog: pytest.LogCaptureFixture
) -> None:
    if obstacle == "file in its place":
        directory.write_bytes(b"")
        target = directory
    elif obstacle == "file above it":
        directory.write_bytes(b"")
        target = directory / "below"
    else:
        target = Path("/proc/diffmergefs")
    kept = memory(target)
    for _ in range(2):
        kept.remember("sha256", OLD, "ab")
        assert kept.recall("sha256", OLD) is None
    [line] = warnings(caplog)
    assert "the next run verifies again" in line


def test_what_a_path_had_before_is_replaced(directory: Path) -> None:
    kept = memory(directory)
    newer = OLD._replace(version=VERSION._replace(mtime_ns=VERSION.mtime_ns + 1))
    kept.remember("sha256", OLD, "old")
    kept.remember("seal", OLD, "seal")
    kept.remember("sha256", newer, "new")
    assert kept.recall("sha256", OLD) is None
    assert kept.recall("sha256", newer) == "new"
    assert kept.recall("seal", OLD) == "seal"


def test_the_oldest_entries_go_when_there_are_too_many(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verified, "MAX_REMEMBERED", 3)
    kept = memory(directory)
    files = [OLD._replace(path=f"/{n}") for n in range(5)]
    for file in files[:3]:
        kept.remember("sha256", file, "ab")
    kept.remember("sha256", files[0], "renewed")  # the youngest again
    for file in files[3:]:
        kept.remember("sha256", file, "ab")
    known = [kept.recall("sha256", file) for file in files]
    assert known == ["renewed", None, None, "ab", "ab"]


def test_threads_share_one_memory(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = memory(directory)

    def work(thread: int) -> None:
        for n in range(5):
            file = OLD._replace(path=f"/{thread}/{n}")
            kept.remember("sha256", file, str(thread))
            assert kept.recall("sha256", file) == str(thread)

    threads = [threading.Thread(target=work, args=[n]) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    found = [
        kept.recall("sha256", OLD._replace(path=f"/{t}/{n}")) for t in range(8) for n in range(5)
    ]
    assert found == [str(t) for t in range(8) for _ in range(5)]
    assert not warnings(caplog)


_WRITER = """
import sys
from diffmergefs.core.identity import FileVersion
from diffmergefs.sidecars.verified import Identity, Remembered
for n in range(10):
    kept = Remembered(sys.argv[1])
    file = Identity(f"/{sys.argv[2]}/{n}", FileVersion(1, 2, 3, 4, 5))
    kept.remember("sha256", file, sys.argv[2])
"""


def test_processes_share_one_memory(directory: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", _WRITER, str(directory), str(n)]) for n in range(4)
    ]
    assert [writer.wait(60) for writer in writers] == [0] * 4
    kept = memory(directory)
    for w in range(4):
        for n in range(10):
            assert kept.recall("sha256", Identity(f"/{w}/{n}", FileVersion(1, 2, 3, 4, 5))) == str(
                w
            )


def test_a_locked_database_is_no_error(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(verified, "_BUSY_SECONDS", 0.01)
    kept = memory(directory)
    kept.remember("sha256", OLD, "ab")
    [database] = directory.iterdir()
    other = sqlite3.connect(database)
    try:
        other.execute("BEGIN EXCLUSIVE")
        assert kept.recall("sha256", OLD) is None
    finally:
        other.close()
    assert kept.recall("sha256", OLD) == "ab"
    assert "locked" in warnings(caplog)[0]


def test_roots_directory_is_fixed_whatever_the_caller_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("XDG_STATE_HOME", "/home/mallory")
    monkeypatch.setenv("HOME", "/home/mallory")
    assert default_directory() == verified.ROOTS_DIRECTORY


def test_another_users_directory_follows_the_xdg_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = pwd.getpwnam("nobody")
    monkeypatch.setattr(os, "geteuid", lambda: nobody.pw_uid)
    monkeypatch.setenv("HOME", "/home/elsewhere")
    home = f"{nobody.pw_dir}/.local/state/diffmergefs"
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert default_directory() == home
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert default_directory() == home
    monkeypatch.setenv("XDG_STATE_HOME", "/states")
    assert default_directory() == "/states/diffmergefs"


def test_a_user_without_a_home_remembers_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 3_999_999_999)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    kept = Remembered()
    kept.remember("sha256", OLD, "ab")
    assert kept.recall("sha256", OLD) is None
    assert "3999999999" in warnings(caplog)[0]
