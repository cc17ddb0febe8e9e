"""Running a program of ours, a file of this package, in a process of its own."""

from __future__ import annotations

import subprocess
import sys


def start(program: str, *arguments: str, stdin: int, stdout: int) -> subprocess.Popen[bytes]:
    """Run the file with this interpreter; stderr is lost. Raises OSError.

    Neither the environment nor a directory of somebody's says what is run: the program sees the
    standard library only. It is in a session of its own, so that no terminal's signal reaches it.
    """
    return subprocess.Popen(
        [sys.executable, "-I", "-S", program, *arguments],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={},
        start_new_session=True,
    )
