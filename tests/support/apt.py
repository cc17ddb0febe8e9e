"""Debian packages that a test wants a file of, without installing them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def run(*command: str, cwd: Path | None = None) -> str:
    """The output of a command. Raises subprocess.SubprocessError."""
    return subprocess.run(
        command, cwd=cwd, check=True, capture_output=True, text=True, timeout=60
    ).stdout


def with_lists(action: Callable[[], T]) -> T:
    """The result of `action`, which needs package lists: a fresh system has none, and gets them."""
    try:
        return action()
    except subprocess.SubprocessError:
        run("apt-get", "-q", "update")
        return action()


def download(directory: Path, name: str) -> Path:
    """Fetch the package of this name into the directory, and return its file.

    Raises subprocess.SubprocessError.
    """
    run("apt-get", "-q", "download", name, cwd=directory)
    return next(directory.glob(f"{name}_*.deb"))
