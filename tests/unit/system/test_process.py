"""Whether a process lives, how it ended, and that the kernel may end it first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffmergefs.system.process import end_of, is_dead, oom_kills, text_of_end
from tests.support.live import until


@pytest.fixture
def child() -> Iterator[int]:
    """A process that sleeps, and that nobody has waited for at the end."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.pause()
        finally:
            os._exit(0)
    yield pid
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def test_a_process_is_dead_once_it_has_ended_and_also_once_it_is_gone(child: int) -> None:
    assert not is_dead(child)
    os.kill(child, signal.SIGKILL)
    until(lambda: is_dead(child), "it did not end")
    assert end_of(child) == -signal.SIGKILL
    assert is_dead(child) and not Path(f"/proc/{child}").exists()


def test_one_that_lives_has_no_end_and_one_that_others_waited_for_was_killed(child: int) -> None:
    assert end_of(child, 1) is None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert end_of(child) == -signal.SIGKILL


@pytest.mark.parametrize("status", [0, 3, 70])
def test_an_exit_status_is_told(status: int) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(status)
    until(lambda: is_dead(pid), "it did not end")
    assert end_of(pid) == status


def test_each_end_has_its_words() -> None:
    assert text_of_end(3) == "it ended with status 3"
    assert text_of_end(-signal.SIGSEGV) == "it was killed by SIGSEGV"
    assert "still waits" in text_of_end(None)


@pytest.mark.parametrize("number", range(1, 65))
def test_any_signal_has_a_text(number: int) -> None:
    """Real-time signals, too, and those of which the C library makes a secret."""
    assert text_of_end(-number).startswith("it was killed by ")


def test_the_kernels_count_of_its_kills_is_one_line_that_stays() -> None:
    assert oom_kills() == oom_kills()
    assert not oom_kills() or oom_kills().startswith("oom_kill ")


def test_the_kernel_is_told_to_kill_it_before_others() -> None:
    code = """
from pathlib import Path
from diffmergefs.system.process import prefer_for_oom
scores = []
for _ in range(12):
    prefer_for_oom()
    scores.append(int(Path("/proc/self/oom_score_adj").read_text()))
print(*scores)
"""
    before = int(Path("/proc/self/oom_score_adj").read_text())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = [min(1000, before + 100 * n) for n in range(1, 13)]
    assert list(map(int, done.stdout.split())) == expected
