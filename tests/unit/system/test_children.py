"""Child processes: a question that may hang, and Python that runs our code alone (law 9)."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffmergefs.system import children
from diffmergefs.system.children import ask, ask_all, is_connected
from tests.support.subjects.children import plant


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


def test_several_questions_have_their_answers_in_order() -> None:
    def refused() -> bytes:
        raise PermissionError(errno.EACCES, "of the child")

    def hung() -> bytes:
        time.sleep(60)
        return b"late"

    first, second, third, fourth = ask_all([lambda: b"one", refused, hung, lambda: b"four"], 0.5)
    assert (first, fourth) == (b"one", b"four")
    assert isinstance(second, PermissionError) and second.errno == errno.EACCES
    assert isinstance(third, TimeoutError)
    assert ask_all([]) == []


def test_several_questions_are_asked_at_the_same_time(tmp_path: Path) -> None:
    """Each waits for the other one."""
    for name in "ab":
        os.mkfifo(tmp_path / name)

    def read_then_write() -> bytes:
        found = (tmp_path / "a").read_bytes()
        (tmp_path / "b").write_bytes(b"second")
        return found

    def write_then_read() -> bytes:
        (tmp_path / "a").write_bytes(b"first")
        return (tmp_path / "b").read_bytes()

    assert ask_all([read_then_write, write_then_read]) == [b"first", b"second"]


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


def test_python_m_leaves_the_current_directory_alone_once_it_runs(tmp_path: Path) -> None:
    """Up to there it is Python's own doing, and a module of that name would be run by it."""
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\n"
    for name in ("trio", "pyfuse3", "click"):
        (tmp_path / f"{name}.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "diffmergefs", "doctor"],
        cwd=tmp_path,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode in (0, 1) and not ran.exists()


def answer_of(code: str) -> str:
    child = children.start_code(code, stdout=subprocess.PIPE)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    return out.decode()


@pytest.mark.parametrize("user", [0, 1000])
def test_what_this_process_finds_is_found_and_nothing_else(
    user: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with PYTHONPATH, `pip install --user` or a checkout."""
    ran = plant(tmp_path / "here")
    (tmp_path / "hé 're").mkdir()
    (tmp_path / "hé 're" / "only_here.py").write_text("word = 'found'\n")
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", ["", ".", "here", str(tmp_path / "hé 're"), *sys.path])
    assert answer_of("import only_here, trio, json; print(only_here.word, end='')") == "found"
    shown = answer_of("import os; print(os.getcwd(), all(map(os.path.isabs, sys.path)))")
    assert shown == "/ True\n"
    assert not ran.exists()


def test_roots_interpreter_heeds_no_variable_of_pythons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = plant(tmp_path / "there")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "there"))
    assert answer_of("print(sys.flags.isolated, sys.argv)") == "1 ['-c']\n"
    assert not ran.exists()
