"""Answers and errors of a question that a child process asks."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from diffmergefs.system.asking import ask, is_connected


def test_the_answer_comes_whole_from_another_process() -> None:
    long = bytes(range(256)) * 4096
    assert ask(lambda: long) == long
    assert ask(lambda: b"") == b""
    assert int(ask(lambda: b"%d" % os.getpid())) != os.getpid()


def test_an_error_has_its_number_here() -> None:
    def refused() -> bytes:
        raise PermissionError(errno.EACCES, "of the child")

    with pytest.raises(PermissionError) as caught:
        ask(refused)
    assert caught.value.errno == errno.EACCES


def test_a_child_that_dies_is_an_error() -> None:
    with pytest.raises(OSError, match="died before it answered") as caught:
        ask(lambda: os._exit(3))
    assert caught.value.errno == errno.EIO


def test_no_answer_is_a_timeout() -> None:
    def hung() -> bytes:
        time.sleep(60)
        return b"late"

    with pytest.raises(TimeoutError):
        ask(hung, 0.01)


def test_no_descriptor_of_ours_is_left_in_the_child(tmp_path: Path) -> None:
    with (tmp_path / "layer").open("wb") as file:

        def listed() -> bytes:
            links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
            return b" ".join(os.fsencode(os.readlink(x)) for x in links if os.path.lexists(x))

        assert os.fsencode(file.name) not in ask(listed)


@pytest.mark.parametrize(
    ("number", "connected"),
    [(None, True), (errno.EACCES, True), (errno.ENOTCONN, False), (errno.ECONNABORTED, False)],
)
def test_a_mount_without_a_server_is_not_connected(
    number: int | None, connected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(path: str) -> None:
        if number is not None:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "statvfs", answer)
    assert is_connected(str(tmp_path)) == connected
