"""The command line: verbs, output, exit codes. Only this package prints."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TextIO

import click

from diffmergefs.cli.output import print_diagnostic
from diffmergefs.cli.verbs import Verbs
from diffmergefs.core import __version__
from diffmergefs.core.errors import DiffMergeError, FileAccessError
from diffmergefs.opening.opener import raise_descriptor_limit
from diffmergefs.system.mountpoint import ROOTS_PATH
from diffmergefs.system.sdnotify import ADDRESS, JOURNAL

USAGE = 2
BUG = 70

_OF_TERMINALS = {
    *("TERM", "COLORTERM", "NO_COLOR", "COLUMNS", "LINES", "LANG", "LANGUAGE"),
    *("_DIFFMERGEFS_COMPLETE", "COMP_WORDS", "COMP_CWORD"),
}
# A service manager's, for `mount` alone, which takes them out: whom to tell that it is ready, which
# stream is the journal, and which descriptors stay open. Whoever names a socket to root gets two
# counts.
_OF_SERVICES = {ADDRESS, JOURNAL, "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"}


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="diffmergefs")
def cli() -> None:
    """Shows chains of VM snapshots (a full base and sparse diffs) as complete memory files.

    \b
    Examples:
      diffmergefs mount /srv/snapshots /mnt/views
      diffmergefs mount --base mem_file --diff mem_diff /mnt/view
      diffmergefs list /srv/snapshots
      diffmergefs flatten /srv/snapshots/pandas -o pandas.mem

    Exit codes: 0 fine, 1 no, 2 usage; docs/exit-codes.md lists the others.
    """


def main(
    arguments: list[str] | None = None,
    command: click.Command = cli,
    name: str = "diffmergefs",
) -> int:
    """Run `command`, which its user calls `name`; the exit code.

    A user's mistake is one line, a bug a traceback.

    Without `arguments` those of the process count, and what is in its environment, if it is
    root's, is thrown away but for how a terminal looks, what its user speaks, and whom a service
    tells how it is.
    """
    _repair_process()
    if arguments is None and os.geteuid() == 0:
        _distrust_environment()
    _end_on_signals()
    _make_stdout_take_all()
    raise_descriptor_limit()
    streams = sys.stdout, sys.stderr
    try:
        with _warnings_printed():
            return _run(arguments, command, name)
    finally:
        for stream in streams:
            _settle(stream)


def _repair_process() -> None:
    """Have the standard streams open, no signal blocked, and SIGCHLD not ignored.

    A closed standard stream is as good as /dev/null; left closed, the first file that is opened
    would take its place, and get what is said there. SIGTERM would never come if it is blocked, and
    where SIGCHLD is ignored nobody learns how a child ended. (Ignored signals that end a process
    stay ignored, as nohup(1) has it.)
    """
    for fd in range(3):
        if not _is_open(fd):
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
    sys.stdout = sys.stdout or _stream(1)
    sys.stderr = sys.stderr or _stream(2)
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _stream(fd: int) -> TextIO:
    return open(fd, "w", encoding="utf-8", closefd=False)


def _settle(stream: TextIO) -> None:
    # What a stream did not take (a full disk, a reader that went away) was told of or cannot be.
    # Kept in its buffer, the interpreter would try it again at its end: exit 120, and a traceback.
    try:
        stream.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        stream.flush()


def _run(arguments: list[str] | None, command: click.Command, name: str) -> int:
    try:
        answer = command.main(arguments, prog_name=name, standalone_mode=False)
        sys.stdout.flush()
        return answer if isinstance(answer, int) else 0
    except click.ClickException as error:
        with suppress(OSError):
            error.show()
        return USAGE
    except (click.Abort, KeyboardInterrupt):
        print_diagnostic("interrupted")
        return 128 + signal.SIGINT
    except DiffMergeError as error:
        print_diagnostic(str(error))
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output went away; nothing more can be said there.
        return 128 + signal.SIGPIPE
    except SystemExit as error:
        # When the reader of stdout went away click and rich end with 1, which says 'no' here.
        if error.code != 1:
            raise
        return 128 + signal.SIGPIPE
    except OSError as error:
        print_diagnostic(f"{error.filename or 'output'}: {error.strerror or error}")
        return FileAccessError.exit_code
    except Exception:
        with suppress(OSError):
            traceback.print_exc()
        print_diagnostic("this is a bug in diffmergefs; please report it with the lines above")
        return BUG


class _PrintOnce(logging.Handler):
    # Says the same once: a command may open the same layers several times.

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._printed: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if line not in self._printed:
            print_diagnostic(line)
        self._printed.add(line)


@contextmanager
def _warnings_printed() -> Iterator[None]:
    # Warnings go to stderr like all talk (`mount` sees to its log itself). What a layer says of
    # its change the error that follows says too.
    handler = _PrintOnce(logging.WARNING)
    handler.addFilter(lambda record: record.name != "diffmergefs.core.layer")
    log = logging.getLogger("diffmergefs")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _distrust_environment() -> None:
    # PATH, TMPDIR, HOME and the like may lead whatever we, our libraries or our children look for
    # to a place of someone who is not root.
    known = _OF_TERMINALS | _OF_SERVICES
    kept = {k: v for k, v in os.environ.items() if k in known or k.startswith("LC_")}
    os.environ.clear()
    os.environ.update(kept, PATH=ROOTS_PATH)


def _make_stdout_take_all() -> None:
    # A name that its encoding lacks is escaped.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _end_on_signals() -> None:
    # So that outputs in the making are removed: an exception runs the `finally` blocks, a signal's
    # default action does not.
    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, end)
