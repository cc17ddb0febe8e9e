"""Leases: is a layer open for writing, and does someone open it so later."""

from __future__ import annotations

import errno
import fcntl
import gc
import logging
import mmap
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import FrameType

import pytest

from diffmergefs.core import sparse
from diffmergefs.core.errors import FileAccessError, WriterError
from diffmergefs.core.layer import Layer
from diffmergefs.opening import writers as module
from diffmergefs.opening.writers import (
    Leases,
    Writers,
    require_no_writer,
    require_no_writers,
    writers,
)
from tests.support import skips
from tests.support.images import PAGE, signed, write_layer
from tests.support.live import until
from tests.support.users import NOBODY
from tests.support.writers import break_leases, is_leased, lease_holders, opened_for_writing


def written(folder: Path, name: str = "layer") -> Path:
    return write_layer(folder / name, 4 * PAGE, [(PAGE, signed(1, PAGE, PAGE))])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path)


@pytest.fixture
def fd(path: Path) -> Iterator[int]:
    number = os.open(path, os.O_RDONLY)
    yield number
    os.close(number)


@pytest.fixture
def told() -> Iterator[list[int]]:
    """The signals that this process got of broken leases, while it handles them."""
    numbers: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        numbers.append(number)

    before = signal.signal(module.SIGNAL, note)
    yield numbers
    signal.signal(module.SIGNAL, before)


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


def as_nobody(ask: Callable[[], str]) -> str:
    """What `ask` gives in a child of this process that has become the user nobody."""
    skips.require_root()
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.write(write_end, ask().encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end, encoding="utf-8") as answer:
        text = answer.read()
    assert os.waitpid(child, 0) == (child, 0)
    return text


# Asking


def test_nobody_writes(real_fs: Path) -> None:
    with closing(Layer.open(str(written(real_fs)))) as layer:
        assert writers(layer.fd) is Writers.NONE


def test_another_process_has_it_open_for_writing(real_fs: Path) -> None:
    path = written(real_fs)
    with closing(Layer.open(str(path))) as layer:
        with opened_for_writing(path):
            assert writers(layer.fd) is Writers.SOME
        assert writers(layer.fd) is Writers.NONE


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


def test_asking_keeps_no_lease_and_leaves_others_alone(path: Path, fd: int) -> None:
    assert writers(fd) is Writers.NONE
    assert not is_leased(path)
    with closing(Layer.open(str(path))) as layer:
        Leases().require_no_writer(layer)
        assert writers(fd) is Writers.NONE
        assert lease_holders(path) == {os.getpid()}
        assert is_leased(path)


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


def test_somebody_elses_file_cannot_be_asked_about(public_path: Path) -> None:
    path = written(public_path)
    fd = os.open(path, os.O_RDONLY)
    try:
        assert as_nobody(lambda: writers(fd).name) == "NOT_OWNER"
        os.chown(path, NOBODY, NOBODY)
        assert as_nobody(lambda: writers(fd).name) == "NONE"
        with opened_for_writing(path):
            assert as_nobody(lambda: writers(fd).name) == "SOME"
    finally:
        os.close(fd)


@pytest.mark.parametrize("number", sorted(module._NO_LEASES), ids=errno.errorcode.get)
def test_a_filesystem_without_leases(
    path: Path, fd: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "fcntl", failing(number))
    assert writers(fd) is Writers.NO_LEASES
    require_no_writer(fd, str(path))


@pytest.mark.parametrize("magic", sorted(module._SHARED_FILESYSTEMS), ids=hex)
def test_a_server_that_delegates_nothing_says_nothing_of_writers(
    path: Path, fd: int, magic: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened_for_writing(path):
        assert writers(fd) is Writers.SOME
        monkeypatch.setattr(sparse, "filesystem_magic", lambda fd: magic)
        assert writers(fd) is Writers.NO_LEASES


def test_another_failure_is_one(path: Path, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "fcntl", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        writers(fd)
    with pytest.raises(FileAccessError, match=f"^{path}: cannot ask for a lease: Input/output"):
        require_no_writer(fd, str(path))


def test_a_writer_is_refused_with_the_path_and_the_way_out(path: Path, fd: int) -> None:
    require_no_writer(fd, "called so")
    with opened_for_writing(path), pytest.raises(WriterError) as refused:
        require_no_writer(fd, "called so")
    text = str(refused.value)
    assert text.startswith("called so: open for writing") and "--allow-writers" in text
    assert "\n" not in text
    assert (refused.value.exit_code, refused.value.errno) == (18, errno.EBUSY)


# Keeping


def test_a_kept_lease_tells_of_whoever_opens_the_file_for_writing(
    path: Path, told: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    leases = Leases()
    with closing(Layer.open(str(path))) as layer:
        leases.require_no_writer(layer)
        leases.answer_breaks()
        assert caplog.messages == [] and told == []
        assert is_leased(path)
        until(lambda: told == [module.SIGNAL], "no signal came")
        assert is_leased(path)  # as long as nobody answers
        leases.answer_breaks()
        with opened_for_writing(path):
            pass
        leases.answer_breaks()
    (line,) = caplog.messages
    assert line == f"{path}: opened for writing by someone; its views fail if it is written to"


def test_a_reader_is_not_told_of(path: Path, told: list[int]) -> None:
    leases = Leases()
    with closing(Layer.open(str(path))) as layer, path.open("rb") as file:
        leases.require_no_writer(layer)
        assert file.read() == path.read_bytes()
        assert lease_holders(path) == {os.getpid()}
    assert told == []


def test_a_lease_that_a_thread_took_tells_the_process_when_the_thread_is_gone(
    path: Path, told: list[int]
) -> None:
    leases = Leases()
    with closing(Layer.open(str(path))) as layer:
        thread = threading.Thread(target=leases.require_no_writer, args=(layer,))
        thread.start()
        thread.join()
        until(lambda: not os.path.exists(f"/proc/self/task/{thread.native_id}"), "it lives on")
        break_leases([path])
        until(lambda: told == [module.SIGNAL], "no signal came")
        leases.answer_breaks()
        assert not is_leased(path)


def test_without_a_handler_the_signal_does_nothing(path: Path) -> None:
    assert signal.getsignal(module.SIGNAL) is signal.SIG_DFL
    leases = Leases()
    with closing(Layer.open(str(path))) as layer:
        leases.require_no_writer(layer)
        break_leases([path])
        leases.answer_breaks()
    assert not is_leased(path)


def test_many_broken_at_once_are_all_given_back_by_one_answer(tmp_path: Path) -> None:
    paths = [written(tmp_path, f"{n}") for n in range(64)]
    leases = Leases()
    layers = [Layer.open(str(path)) for path in paths]
    for layer in layers:
        leases.require_no_writer(layer)
    break_leases(paths[:50])
    leases.answer_breaks()
    assert [path for path in paths if lease_holders(path)] == paths[50:]
    with opened_for_writing(*paths[:50]):
        pass
    for layer in layers:
        layer.close()


def test_a_break_while_the_lease_is_being_taken_is_answered(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases = Leases()
    answering = threading.Thread(target=leases.answer_breaks)
    real = module._take

    def take_and_be_broken(fd: int) -> Writers:
        found = real(fd)
        break_leases([path])
        answering.start()  # as the signal's handler would
        return found

    monkeypatch.setattr(module, "_take", take_and_be_broken)
    with closing(Layer.open(str(path))) as layer:
        leases.require_no_writer(layer)
        answering.join(60)
        assert not answering.is_alive()
        assert not is_leased(path)


def test_a_lease_that_was_broken_is_taken_again(path: Path) -> None:
    leases = Leases()
    with closing(Layer.open(str(path))) as layer:
        for _ in range(3):
            leases.require_no_writer(layer)
            leases.require_no_writer(layer)
            assert lease_holders(path) == {os.getpid()}
            break_leases([path])
            leases.answer_breaks()
            with opened_for_writing(path), pytest.raises(WriterError):
                leases.require_no_writer(layer)
            assert lease_holders(path) == set()


def test_an_opener_who_still_waits_is_a_writer_and_is_let_through(
    path: Path, told: list[int]
) -> None:
    leases = Leases()
    with closing(Layer.open(str(path))) as layer:
        leases.require_no_writer(layer)

        opened = threading.Event()

        def open_it() -> None:
            with path.open("r+b"):
                opened.set()

        opener = threading.Thread(target=open_it)
        opener.start()
        until(lambda: told, "no signal came")
        with pytest.raises(WriterError):
            leases.require_no_writer(layer)
        assert not opened.is_set()
        leases.answer_breaks()
        opener.join(60)
        assert opened.is_set()


def test_a_lease_ends_with_its_layer(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    leases = Leases()
    for end in (Layer.close, lambda layer: None):
        layer = Layer.open(str(path))
        leases.require_no_writer(layer)
        end(layer)
        del layer
        gc.collect()
        assert lease_holders(path) == set()
        leases.answer_breaks()
        assert not is_leased(path)
    assert caplog.messages == []


def test_what_cannot_be_told_is_said_once_for_each_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    layers = [Layer.open(str(written(tmp_path, f"{n}"))) for n in range(3)]
    leases = Leases()
    for number in (errno.EACCES, errno.EINVAL, errno.EACCES):
        monkeypatch.setattr(fcntl, "fcntl", failing(number))
        for layer in layers:
            leases.require_no_writer(layer)
    monkeypatch.undo()
    assert caplog.messages == [
        f"{layers[0].path}: {Writers.NOT_OWNER.value}",
        f"{layers[0].path}: {Writers.NO_LEASES.value}",
    ]
    leases.answer_breaks()  # none is kept, so none is broken
    assert len(caplog.messages) == 2
    for layer in layers:
        layer.close()


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
    assert not any(lease_holders(path) for path in paths)
    for layer in layers:
        layer.close()


@pytest.mark.parametrize("allowed", [False, True])
def test_leases_are_kept_on_the_layers_without_a_writer(tmp_path: Path, allowed: bool) -> None:
    paths = [written(tmp_path, f"{n}") for n in range(3)]
    layers = [Layer.open(str(path)) for path in paths]
    leases = Leases()
    with opened_for_writing(paths[0]):
        if allowed:
            assert len(require_no_writers(layers, allowed=True, leases=leases)) == 1
            assert [bool(lease_holders(path)) for path in paths] == [False, True, True]
        else:
            with pytest.raises(WriterError):
                require_no_writers(layers, allowed=False, leases=leases)
    for layer in layers:
        layer.close()
