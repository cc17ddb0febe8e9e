"""Python in a process of its own: the one place that starts our interpreter.

A new interpreter looks for modules in its current directory, and where its environment says. For
root both may be somebody else's (law 9). So each is started in /, and is told where to look.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from typing import IO

_Stream = int | IO[bytes]


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


def start_code(
    code: str,
    *arguments: str,
    stdout: _Stream = subprocess.DEVNULL,
    stderr: _Stream = subprocess.DEVNULL,
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Run Python code with this interpreter, in /; stdin is /dev/null. Raises OSError.

    It finds the modules that this process finds, by the absolute entries of its `sys.path`, and no
    others. As root it heeds no variable of Python's in its environment, which is ours or `env`.
    """
    known = [entry for entry in sys.path if os.path.isabs(entry)]
    return subprocess.Popen(
        [
            sys.executable,
            "-I" if os.geteuid() == 0 else "-P",
            "-c",
            f"import sys; sys.path[:] = {known!a}; {code}",
            *arguments,
        ],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        cwd="/",
        env=env,
    )
