"""The command line, run as its users run it."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from diffmergefs import cli
from diffmergefs.cli.verbs import TABLE, load
from tests.support import skips
from tests.support.users import NOBODY

# What a command loads when it needs it: `as_user` might look for it in vain.
for name in TABLE:
    load(name)
for name in (
    *("difflib", "pickle", "multiprocessing.connection", "multiprocessing.popen_fork"),
    *("diffmergefs.sidecars.bmapreader", "rich.console", "rich.progress", "rich.table"),
):
    importlib.import_module(name)
if find_spec("pyfuse3") and find_spec("prometheus_client"):
    for name in (
        *("diffmergefs.fuse.looking", "diffmergefs.fuse.mounting", "diffmergefs.fuse.session"),
        *("prometheus_client", "prometheus_client.registry"),
    ):
        importlib.import_module(name)


#: How a line ends that says what a user may not do.
DENIED = "Permission denied; use an account that has this permission, or change it"


def diffmergefs(
    *arguments: str | Path, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python -m diffmergefs ...`, with its output as text (what is not UTF-8 as surrogates)."""
    return subprocess.run(
        [sys.executable, "-m", "diffmergefs", *[str(argument) for argument in arguments]],
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        stdin=subprocess.DEVNULL,
        cwd=cwd,
        env=os.environ | environment,
        timeout=60,
        check=False,
    )


def succeed(*arguments: str | Path) -> str:
    """What the command prints; it must succeed, and say nothing on stderr."""
    done = diffmergefs(*arguments)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def mistake(status: int, *arguments: str | Path) -> str:
    """The one line on stderr with which the command ends, with this status and no output."""
    return one_line(diffmergefs(*arguments), status)


def one_line(done: subprocess.CompletedProcess[str], status: int) -> str:
    """The only line that a failed command printed; fails if there is more, or another status."""
    assert (done.returncode, done.stdout) == (status, ""), done
    assert done.stderr.startswith("diffmergefs: "), done
    assert done.stderr.endswith("\n") and done.stderr.count("\n") == 1, done
    return done.stderr


def unsized(text: str) -> str:
    """The text without the sizes that stand in parentheses beside bytes: `65536 (64 KiB)`."""
    return re.sub(r" \([\d.]+ [KMGT]iB\)", "", text)


def diffmergefs_as_nobody(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command line as the user nobody, like `as_user`."""
    return as_user(NOBODY, NOBODY, arguments)


def as_user(
    uid: int,
    gid: int,
    arguments: Sequence[str | Path],
    prepare: Callable[[], None] = lambda: None,
) -> subprocess.CompletedProcess[str]:
    """The command line in a child of this process that has become this user.

    A new process of that user might not be able to read the virtual environment. `prepare` is
    called in the child before that. Skips the test unless it runs as root.
    """
    skips.require_root()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            status = 99
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                prepare()
                os.setgroups([])
                os.setgid(gid)
                os.setuid(uid)
                status = cli.main([os.fspath(argument) for argument in arguments])
                sys.stdout.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        _, ended = os.waitpid(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "surrogateescape"))
    return subprocess.CompletedProcess([], os.waitstatus_to_exitcode(ended), *texts)
