"""Interactive shells on terminals of their own, to press the tabulator in."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_SECONDS = 40
_PROMPT = "ready> "
#: How each shell starts without anybody's settings.
STARTS = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
}
#: What makes it fit for a test, and its completion work.
SET_UP = {
    "bash": f"PS1='{_PROMPT}'; bind 'set bell-style none'",
    "zsh": f"PS1='{_PROMPT}'; unsetopt zle_bracketed_paste; autoload -Uz compinit; compinit -u",
}


class Terminal:
    """A shell on a terminal."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._text = ""

    def type(self, text: str) -> None:
        """Press these keys."""
        self._text = ""
        os.write(self._fd, text.encode())

    def wait_for(self, pattern: str) -> None:
        """Wait until what was shown since the last keys has the pattern in it."""
        deadline = time.monotonic() + _SECONDS
        while not re.search(pattern, self._text):
            assert time.monotonic() < deadline, f"no {pattern} in {self._text!r}"
            if select.select([self._fd], [], [], 0.1)[0]:
                self._text += os.read(self._fd, 65536).decode(errors="replace")

    def complete(self, typed: str, completed: str) -> None:
        """Type the line and the tabulator; fails if the line does not become the other one."""
        self.type(f"{typed}\t")
        self.wait_for(re.escape(completed.removeprefix(typed)))
        self.type("\x15")  # the line is thrown away


@contextmanager
def shell_on_a_terminal(
    command: Sequence[str], set_up: str, folder: Path, environment: Mapping[str, str]
) -> Iterator[Terminal]:
    """An interactive shell in `folder`, which has run the commands `set_up`."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=folder,
        env=environment,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        terminal = Terminal(ours)
        terminal.type(f"{set_up}; echo set''up\n")
        terminal.wait_for(r"setup\s")
        yield terminal
    finally:
        process.kill()
        process.wait(20)
        os.close(ours)
