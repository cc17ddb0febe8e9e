"""OSErrors as errors of one line, and what a filesystem reports of its space."""

from __future__ import annotations

import errno
import gc
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffmergefs.core.errors import FileAccessError, NoSpaceError
from diffmergefs.core.failures import Target, block_size, failures, free_bytes
from tests.support.images import PAGE


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    path = tmp_path / "output"
    path.write_bytes(bytes(3 * PAGE))
    fd = os.open(path, os.O_RDWR)
    yield Target(fd, str(path))
    os.close(fd)


def statvfs(monkeypatch: pytest.MonkeyPatch, **fields: int) -> None:
    monkeypatch.setattr(os, "fstatvfs", lambda fd: SimpleNamespace(**fields))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_the_output_its_size_and_what_is_free(
    number: int, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    statvfs(monkeypatch, f_blocks=100, f_bavail=7, f_frsize=512)
    reason = os.strerror(number)
    with pytest.raises(NoSpaceError) as caught, failures("layer", target):
        raise OSError(number, reason)
    assert str(caught.value).startswith(f"{target.path}: {reason} while writing")
    assert f"image of {3 * PAGE} bytes, {7 * 512} are free" in str(caught.value)


def test_every_other_failure_names_the_path(target: Target) -> None:
    for number, of in [(errno.EIO, target), (errno.ENOSPC, None)]:
        with pytest.raises(FileAccessError) as caught, failures("layer", of):
            raise OSError(number, os.strerror(number), "another name")
        assert str(caught.value) == f"layer: {os.strerror(number)}"


def test_what_is_no_oserror_passes() -> None:
    with pytest.raises(ValueError, match="as it was"), failures("layer"):
        raise ValueError("as it was")


def test_what_the_failed_work_had_open_goes_with_the_error(tmp_path: Path) -> None:
    opened: list[weakref.ref[object]] = []

    def work() -> None:
        file = (tmp_path / "file").open("wb", buffering=0)
        opened.append(weakref.ref(file))
        with file, failures("layer"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    gc.disable()
    try:
        with pytest.raises(FileAccessError) as caught:
            work()
        assert opened[0]() is not None  # its traceback holds it
        del caught
        assert opened[0]() is None
    finally:
        gc.enable()


def test_only_what_an_ordinary_user_may_take_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    statvfs(monkeypatch, f_blocks=100, f_bfree=9, f_bavail=4, f_bsize=65536, f_frsize=1024)
    assert free_bytes(0) == 4096
    assert block_size(0) == 1024


def test_a_filesystem_without_a_limit_has_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    statvfs(monkeypatch, f_blocks=0, f_bavail=0, f_frsize=4096)
    assert free_bytes(0) is None


def test_a_filesystem_that_does_not_know_falls_back_and_other_errors_are_raised(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = errno.ENOSYS

    def refused(fd: int) -> os.statvfs_result:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fstatvfs", refused)
    assert free_bytes(target.fd) is None
    assert block_size(target.fd) == os.fstat(target.fd).st_blksize
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        free_bytes(target.fd)
