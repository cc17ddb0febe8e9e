"""/proc/PID/mountinfo, as it is for real mounts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffmergefs.system import mounttable
from diffmergefs.system.mounttable import mount_of
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
