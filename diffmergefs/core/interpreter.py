"""Python in a separate process: the only place that starts our interpreter.

A new interpreter imports modules from its current directory and from where its environment points.
If root runs it, someone else may control both (law 9). So each one starts in /, with an explicit
module path.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from typing import IO

_Stream = int | IO[bytes]


def start(program: str, *arguments: str, stdin: int, stdout: int) -> subprocess.Popen[bytes]:
    """Run a Python file with this interpreter; its stderr is discarded. Raises OSError.

    The program can import only the standard library, whatever the environment and the current
    directory contain. It runs in its own session, so no signal of a terminal reaches it.
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

    It can import exactly what the absolute entries of this process's `sys.path` offer. Its
    environment is ours or `env`; as root it ignores Python's variables there.
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
