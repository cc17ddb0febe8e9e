"""`completion`: real shells complete what a user began to type."""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffmergefs.cli.completion import SHELLS
from tests.support.commands import diffmergefs, succeed

_SECONDS = 40
PROMPT = "ready> "
STARTS = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
}
SET_UP = {
    "bash": f"PS1='{PROMPT}'; bind 'set bell-style none'",
    "zsh": f"PS1='{PROMPT}'; unsetopt zle_bracketed_paste; autoload -Uz compinit; compinit -u",
}
# What is typed, and what the line is when it was completed.
LINES = {
    "diffmergefs fla": "diffmergefs flatten ",
    "diffmergefs mount --allow-ot": "diffmergefs mount --allow-other ",
    "diffmergefs mount --log-format jo": "diffmergefs mount --log-format journald",
    "diffmergefs mount -o open_rw,all": "diffmergefs mount -o open_rw,allow_",
    "diffmergefs mount some-f": "diffmergefs mount some-file",
    "diffmergefs info other-f": "diffmergefs info other-file",
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory with the command as a program, two files, and the scripts of all shells."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "diffmergefs"
    call = "import sys; from diffmergefs.cli import main; sys.exit(main())"
    command.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -c '{call}' \"$@\"\n")
    command.chmod(0o755)
    for shell in SHELLS:
        (tmp_path / f"script.{shell}").write_text(succeed("completion", shell))
    (tmp_path / "some-file").touch()
    (tmp_path / "other-file").touch()
    return tmp_path


def environment(home: Path) -> dict[str, str]:
    return {
        "PATH": f"{home}/bin:{os.environ['PATH']}",
        "HOME": str(home),
        "TERM": "dumb",
        "LC_ALL": "C.UTF-8",
    }


class Terminal:
    """A shell on a terminal of its own, in `home`."""

    def __init__(self, shell: str, home: Path) -> None:
        self._fd, theirs = pty.openpty()
        self.process = subprocess.Popen(
            STARTS[shell],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=home,
            env=environment(home),
            start_new_session=True,
        )
        os.close(theirs)
        self.text = ""
        self.type(f"{SET_UP[shell]}; source ./script.{shell}; echo set''up\n")
        self.wait_for(r"setup\s")

    def type(self, text: str) -> None:
        self.text = ""
        os.write(self._fd, text.encode())

    def wait_for(self, pattern: str) -> None:
        deadline = time.monotonic() + _SECONDS
        while not re.search(pattern, self.text):
            assert time.monotonic() < deadline, f"no {pattern} in {self.text!r}"
            if select.select([self._fd], [], [], 0.1)[0]:
                self.text += os.read(self._fd, 65536).decode(errors="replace")

    def close(self) -> None:
        self.process.kill()
        self.process.wait(20)
        os.close(self._fd)


@pytest.mark.parametrize("shell", STARTS)
def test_a_tabulator_completes(shell: str, home: Path) -> None:
    terminal = Terminal(shell, home)
    try:
        for typed, completed in LINES.items():
            terminal.type(f"{typed}\t")
            terminal.wait_for(re.escape(completed.removeprefix(typed)))
            terminal.type("\x15")  # the line is thrown away
    finally:
        terminal.close()


def test_fish_completes(home: Path) -> None:
    # What has a comma in it click's script for fish takes apart: there, of -o only the first.
    lines = {typed: line for typed, line in LINES.items() if "," not in line}
    lines["diffmergefs mount -o allow_ot"] = "diffmergefs mount -o allow_other"
    for typed, completed in lines.items():
        done = subprocess.run(
            ["fish", "--no-config", "-c", f"source script.fish; complete -C {shlex.quote(typed)}"],
            capture_output=True,
            text=True,
            cwd=home,
            env=environment(home),
            timeout=_SECONDS,
            check=True,
        )
        word = completed.split()[-1]
        offered = [line.partition("\t")[0] for line in done.stdout.splitlines()]
        assert offered and all(line.startswith(word) for line in offered), (typed, done)


def test_another_shell_is_bad_usage() -> None:
    done = diffmergefs("completion", "tcsh")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'tcsh' is not one of 'bash', 'zsh', 'fish'" in done.stderr
