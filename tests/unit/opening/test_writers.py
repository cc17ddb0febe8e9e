"""Leases: does a process have a layer open for writing?"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs.core import sparse
from diffmergefs.core.errors import FileAccessError, WriterError
from diffmergefs.core.layer import Layer
from diffmergefs.opening import writers as module
from diffmergefs.opening.writers import Writers, require_no_writers, writers
from tests.support.subjects.writers import fd, layer, path, written
from tests.support.writers import is_leased, opened_for_writing

__all__ = ["fd", "layer", "path"]


def failing(number: int) -> Callable[..., int]:
    """fcntl, but that taking a lease fails with this errno."""
    real = fcntl.fcntl

    def fail(fd: int, command: int, argument: int = 0) -> int:
        if (command, argument) == (fcntl.F_SETLEASE, fcntl.F_RDLCK):
            raise OSError(number, os.strerror(number))
        answer = real(fd, command, argument)
        assert isinstance(answer, int)
        return answer

    return fail


# Asking


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND])
def test_this_process_has_it_open_for_writing(path: Path, fd: int, flags: int) -> None:
    writer = os.open(path, flags)
    try:
        assert writers(fd) is Writers.SOME
    finally:
        os.close(writer)
    assert writers(fd) is Writers.NONE


def test_readers_are_no_writers(path: Path, fd: int) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE):
        assert writers(fd) is Writers.NONE


def test_a_mapping_is_a_writer_when_its_file_is_closed_already(path: Path, fd: int) -> None:
    with path.open("r+b") as file:
        mapping = mmap.mmap(file.fileno(), 0)
    assert writers(fd) is Writers.SOME
    mapping.close()
    assert writers(fd) is Writers.NONE


def test_asking_keeps_no_lease(path: Path, fd: int) -> None:
    assert writers(fd) is Writers.NONE
    assert not is_leased(path)


def test_an_opener_that_meets_the_lease_harms_neither_side(
    path: Path, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal of the broken lease would end this process if it were SIGIO."""
    real, met = fcntl.fcntl, []

    def meet(fd: int, command: int, argument: int = 0) -> int:
        answer = real(fd, command, argument)
        if (command, argument) == (fcntl.F_SETLEASE, fcntl.F_RDLCK):
            met.append(is_leased(path))
        assert isinstance(answer, int)
        return answer

    monkeypatch.setattr(fcntl, "fcntl", meet)
    assert writers(fd) is Writers.NONE
    assert met == [True] and not is_leased(path)


def test_many_threads_ask_at_once(path: Path) -> None:
    found: list[Writers] = []

    def ask() -> None:
        with path.open("rb") as file:
            found.extend(writers(file.fileno()) for _ in range(100))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {Writers.NONE} and len(found) == 800
    assert not is_leased(path)


@pytest.mark.parametrize("number", sorted(module._NO_LEASES), ids=errno.errorcode.get)
def test_a_filesystem_without_leases(
    layer: Layer, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "fcntl", failing(number))
    assert writers(layer.fd) is Writers.NO_LEASES
    assert require_no_writers([layer], allowed=False) == []


@pytest.mark.parametrize("magic", sorted(module._SHARED_FILESYSTEMS), ids=hex)
def test_a_server_that_delegates_nothing_says_nothing_of_writers(
    path: Path, fd: int, magic: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened_for_writing(path):
        assert writers(fd) is Writers.SOME
        monkeypatch.setattr(sparse, "filesystem_magic", lambda fd: magic)
        assert writers(fd) is Writers.NO_LEASES


def test_another_failure_is_one(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "fcntl", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        writers(layer.fd)
    reason = f"^{layer.path}: cannot ask for a lease: Input/output"
    with pytest.raises(FileAccessError, match=reason):
        require_no_writers([layer], allowed=False)


def test_a_writer_is_refused_with_the_path_and_the_way_out(layer: Layer) -> None:
    assert require_no_writers([layer], allowed=False) == []
    with opened_for_writing(Path(layer.path)), pytest.raises(WriterError) as refused:
        require_no_writers([layer], allowed=False)
    text = str(refused.value)
    assert text.startswith(f"{layer.path}: open for writing") and "--allow-writers" in text
    assert "\n" not in text
    assert (refused.value.exit_code, refused.value.errno) == (18, errno.EBUSY)


# Several layers


def test_the_first_layer_with_a_writer_is_refused(tmp_path: Path) -> None:
    paths = [written(tmp_path, f"{n}") for n in range(4)]
    layers = [Layer.open(str(path)) for path in paths]
    assert require_no_writers(layers, allowed=False) == []
    with opened_for_writing(paths[1], paths[3]):
        with pytest.raises(WriterError, match=f"^{paths[1]}: open for writing"):
            require_no_writers(layers, allowed=False)
        lines = require_no_writers(layers, allowed=True)
    assert [line.split(": ")[:2] for line in lines] == [
        ["--allow-writers overrides", str(paths[n])] for n in (1, 3)
    ]
    assert not any(is_leased(path) for path in paths)
    for one in layers:
        one.close()


def test_what_cannot_be_told_is_logged_once_for_each_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(module, "_reported", set())
    layers = [Layer.open(str(written(tmp_path, f"{n}"))) for n in range(3)]
    for number in (errno.EACCES, errno.EINVAL, errno.EACCES):
        monkeypatch.setattr(fcntl, "fcntl", failing(number))
        assert require_no_writers(layers, allowed=False) == []
    monkeypatch.undo()
    assert caplog.messages == [
        f"{layers[0].path}: {Writers.NOT_OWNER.value}",
        f"{layers[0].path}: {Writers.NO_LEASES.value}",
    ]
    for one in layers:
        one.close()
