"""/proc/PID/mountinfo, as it is for real mounts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffmergefs.system import mounttable
from diffmergefs.system.mounttable import Found, Holder, holders, mount_of, summary
from tests.support.descriptors import opened


def test_a_memfd_has_no_listed_mount() -> None:
    fd = os.memfd_create("nowhere")
    try:
        assert mount_of(fd) is None
    finally:
        os.close(fd)


def test_without_proc_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounttable, "Path", lambda path: tmp_path / "proc")
    with opened(tmp_path) as fd:
        assert mount_of(fd) is None


def test_a_descriptor_that_is_not_open_is_an_oserror() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        mount_of(-1)


def test_of_many_some_are_named_and_the_rest_counted() -> None:
    many = [Holder(pid, "vm", ("mapped", "open")) for pid in range(3, 8)]
    assert summary(many[:1], 3) == "3 vm (mapped, open)"
    assert summary(many[:3], 3).count("vm") == 3 and "more" not in summary(many[:3], 3)
    assert summary(many, 3) == (
        "3 vm (mapped, open), 4 vm (mapped, open), 5 vm (mapped, open), and 2 more"
    )


def test_a_process_that_cannot_be_looked_into_is_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "7").mkdir()
    real = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "maps":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr("diffmergefs.system.mounttable.PROC", str(tmp_path))
    assert holders("0:99", "/x") == Found([], 0)  # one that has ended
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert holders("0:99", "/x") == Found([], 1)
