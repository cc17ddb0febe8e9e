"""`umount` and `status`: what is read of a mount, why it cannot be, and how it is printed."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs import cli
from diffmergefs.cli.mounted import read_status
from diffmergefs.core.errors import (
    DiffMergeError,
    FileAccessError,
    MountFailedError,
    MountTimeoutError,
    counted,
)
from diffmergefs.core.view import HOLE
from diffmergefs.fuse.service import Service
from diffmergefs.fuse.status import Metrics, Status, status_of
from diffmergefs.system import children
from diffmergefs.system import mounted as mounts
from diffmergefs.system.mounttable import FILESYSTEM_TYPE, Mount
from tests.support.commands import unsized


def status() -> Status:
    metrics = Metrics(fast_loop=True)
    metrics.requests["read"] += 3
    metrics.requests["lookup"] += 2
    metrics.errors["lookup", errno.ENOENT] += 1
    metrics.read(1000, {0: 4096, HOLE: 100}, metrics.of_tag("leaf"))
    metrics.read(1500, {1: 8192}, metrics.of_tag("leaf"))
    metrics.waited += 1
    found = status_of(metrics, pushed_bytes=8192, hit_bytes=4096, images=2, files=1)
    return dataclasses.replace(found, version="1.2", pid=7, started=time.time() - 3661.5)


@pytest.fixture
def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that the mount table calls a mount of ours; the file with its status."""
    entry = Mount(str(tmp_path), "0:9", FILESYSTEM_TYPE, "/store", 1, 0, "/")
    monkeypatch.setattr(mounts, "mount_entry", {str(tmp_path): entry}.get)
    (tmp_path / ".diffmergefs").mkdir()
    file = tmp_path / ".diffmergefs" / "status.json"
    file.write_text(status().to_json())
    return file


def asked(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    """Every question to a mount fails with this error from now on."""

    def ask(question: Callable[[], bytes]) -> bytes:
        raise error

    monkeypatch.setattr(children, "ask", ask)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command prints; it must succeed."""
    assert cli.main([*arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_the_status_is_what_the_mounts_own_file_has(mount: Path, tmp_path: Path) -> None:
    text = mount.read_text()
    assert read_status(str(tmp_path)) == Status.from_json(text)
    (tmp_path.parent / "link").unlink(missing_ok=True)
    (tmp_path.parent / "link").symlink_to(tmp_path)
    assert read_status(str(tmp_path.parent / "link")) == Status.from_json(text)


@pytest.mark.parametrize("command", ["status", "umount", "umount --lazy"])
def test_what_is_no_mount_of_ours_is_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command.split(), str(tmp_path)]) == 10
    step = "`diffmergefs status` lists the mounts"
    line = f"diffmergefs: {tmp_path}: not a diffmergefs mount point; {step}\n"
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        (TimeoutError(), MountTimeoutError, "the daemon has not answered for 5 s"),
        (OSError(errno.ENOTCONN, ""), MountFailedError, "stale mount: its daemon died; unmount"),
        (OSError(errno.ECONNABORTED, ""), MountFailedError, "stale mount: its daemon died"),
        (OSError(errno.EIO, "broken"), FileAccessError, "status.json: broken"),
        (
            OSError(errno.EACCES, "denied"),
            FileAccessError,
            "status.json: denied; only the user who mounted it may read it",
        ),
    ],
)
def test_a_daemon_that_does_not_answer_has_a_reason(
    error: OSError,
    expected: type[DiffMergeError],
    text: str,
    mount: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked(monkeypatch, error)
    with pytest.raises(expected, match=text) as caught:
        read_status(str(mount.parents[1]))
    assert str(caught.value).startswith(str(mount.parents[1]))


@pytest.mark.parametrize("text", ["", "[]", '{"pid": 1}', "no JSON"])
def test_the_status_of_another_version_is_refused(text: str, mount: Path) -> None:
    mount.write_text(text)
    with pytest.raises(FileAccessError, match="another version of diffmergefs serves this mount"):
        read_status(str(mount.parents[1]))


# What `status` prints


def test_a_table_has_the_facts_and_the_bytes_of_each_layer(
    mount: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run(capsys, "status", str(mount.parents[1])).splitlines()
    assert [line.split(maxsplit=1) for line in lines[:11] if not line.startswith("read loop")] == [
        ["WHAT", "NOW"],
        ["daemon", "pid 7, version 1.2, up 1:01:01"],
        ["server", f"pid {status().service.server}; if it dies, the mount ends (it has no keeper)"],
        ["open", "2 images, 1 file"],
        ["requests", "lookup 2, read 3"],
        ["errors", "lookup ENOENT 1"],
        ["reads", "2, of which 1 in worker threads"],
        ["latency", "50 % in 1 us, 99 % in 2 us"],
        ["prefetch", "8192 bytes (8 KiB) pushed, 4096 (4 KiB) hit"],
        ["tainted", counted(status().tainted_layers, "layer")],
    ]
    assert [unsized(line).split() for line in lines[11:]] == [
        ["TAG", "LAYER", "BYTES"],
        ["leaf", "hole", "100"],
        ["leaf", "0", "4096"],
        ["leaf", "1", "8192"],
    ]
    assert lines[3].split(maxsplit=2) == ["read", "loop", "fast"]


def test_a_mount_without_requests_has_no_latency_and_no_layers(
    mount: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mount.write_text(status_of(Metrics(), pushed_bytes=0, hit_bytes=0, images=0, files=0).to_json())
    text = run(capsys, "status", str(mount.parents[1]))
    rows = dict(line.split("  ", 1) for line in text.splitlines())
    assert {name: value.strip() for name, value in rows.items()}.items() >= {
        ("read loop", "pyfuse3's own"),
        ("requests", "none"),
        ("errors", "none"),
    }
    assert "latency" not in rows and "TAG" not in text


@pytest.mark.parametrize(
    ("service", "rows"),
    [
        (Service(server=8, covered=True), ["server    pid 8; if it dies, another one goes on"]),
        (
            Service(server=8, obstacle="Linux before 6.9"),
            ["server    pid 8; if it dies, the mount ends (Linux before 6.9)"],
        ),
        (
            Service(
                server=8, servers=2, last_end="it died", longest_stall_seconds=0.0214, covered=True
            ),
            [
                "server    pid 8; if it dies, another one goes on",
                "replaced  1 time, longest stall 21 ms; the last time it died",
            ],
        ),
        (
            Service(server=8, servers=4, last_end="it died", covered=True),
            [
                "server    pid 8; if it dies, another one goes on",
                "replaced  3 times, longest stall 0 ms; the last time it died",
            ],
        ),
    ],
    ids=["covered", "not covered", "replaced once", "replaced"],
)
def test_a_table_says_who_serves(
    service: Service, rows: list[str], mount: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mount.write_text(dataclasses.replace(status(), service=service).to_json())
    lines = run(capsys, "status", str(mount.parents[1])).splitlines()
    found = [line.split(maxsplit=1) for line in lines if line.startswith(("server", "replaced"))]
    assert found == [row.split(maxsplit=1) for row in rows]


def test_a_latency_beyond_the_last_bucket_is_told_as_such(
    mount: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = Metrics()
    metrics.read(60_000_000_000, {0: 1}, metrics.of_tag("leaf"))
    mount.write_text(status_of(metrics, pushed_bytes=0, hit_bytes=0, images=0, files=0).to_json())
    text = run(capsys, "status", str(mount.parents[1]))
    assert "50 % in more than 17 s, 99 % in more than 17 s" in text


def test_json_is_the_status_itself(mount: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "status", "--json", str(mount.parents[1])) == mount.read_text()


def test_it_is_repeated_until_interrupted(
    mount: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            raise KeyboardInterrupt
        mount.write_text(dataclasses.replace(status(), pid=7 + len(waits)).to_json())

    monkeypatch.setattr(time, "sleep", wait)
    text = run(capsys, "status", "--json", "--watch", "--interval=0.5", str(mount.parents[1]))
    decoder, pids = json.JSONDecoder(), []
    while text:
        found, end = decoder.raw_decode(text)
        pids.append(found["pid"])
        text = text[end:].lstrip()
    assert (pids, waits) == ([7, 8, 9], [0.5] * 3)


def test_a_mount_is_unmounted_by_its_path(
    mount: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    monkeypatch.setattr(mounts, "unmount", lambda path, *, lazy: calls.append((path, lazy)))
    folder = os.fspath(mount.parents[1])
    assert run(capsys, "umount", folder) == run(capsys, "umount", "--lazy", folder) == ""
    assert calls == [(folder, False), (folder, True)]
