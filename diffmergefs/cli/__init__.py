"""The command line: its start, its exit codes, and what it inherits. Only this package prints."""

from __future__ import annotations

import functools
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
from diffmergefs.cli.usage import error_line, usage_line
from diffmergefs.cli.verbs import Verbs
from diffmergefs.core import __version__
from diffmergefs.core.errors import DiffMergeError, FileAccessError, MissingExtraError
from diffmergefs.opening.opener import raise_descriptor_limit
from diffmergefs.system.children import ROOTS_PATH
from diffmergefs.system.daemon import ADDRESS, JOURNAL
from diffmergefs.system.installation import install_command, missing_package

USAGE = 2
BUG = 70
CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

_TERMINAL_VARIABLES = {
    *("TERM", "COLORTERM", "NO_COLOR", "COLUMNS", "LINES", "LANG", "LANGUAGE"),
    *("_DIFFMERGEFS_COMPLETE", "COMP_WORDS", "COMP_CWORD"),
}
# Variables of a service manager, for `mount` only, which removes them: the socket for READY=1, the
# journal's stream, and the descriptors to keep open. The socket only receives two counts, so it is
# harmless if another user made root use it.
_SERVICE_VARIABLES = {ADDRESS, JOURNAL, "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"}


@click.group(cls=Verbs, context_settings=CONTEXT_SETTINGS)
@click.version_option(__version__, "-V", "--version", prog_name="diffmergefs")
def cli() -> None:
    """Show chains of VM snapshots (a full base and sparse diffs) as complete memory files.

    \b
    Examples:
      diffmergefs mount /srv/snapshots /mnt/views
      diffmergefs mount --base mem_file --diff mem_diff /mnt/view
      diffmergefs list /srv/snapshots
      diffmergefs flatten /srv/snapshots/pandas -o pandas.mem

    `diffmergefs help COMMAND` explains a command. Exit codes: 0 success, 1 the answer is no, 2
    usage error; docs/exit-codes.md lists the others.
    """


def main(
    arguments: list[str] | None = None,
    command: click.Command = cli,
    name: str = "diffmergefs",
) -> int:
    """Run `command` under the program name `name`. Return the exit code.

    An expected error prints one line, a bug prints a traceback. Without `arguments`, those of the
    process are used, and as root, environment variables are removed except locale and terminal
    settings and the variables of a service manager.
    """
    _repair_process()
    if arguments is None and os.geteuid() == 0:
        _distrust_environment()
    _escape_on_stdout()
    raise_descriptor_limit()
    streams = sys.stdout, sys.stderr
    try:
        with _ended_by_signals(), _warnings_printed():
            return _run(arguments, command, name)
    finally:
        for stream in streams:
            _flush(stream)


def _repair_process() -> None:
    # Undo what the parent process may have left. A closed standard stream becomes /dev/null:
    # otherwise the first opened file would get its number, and our output. A blocked SIGTERM would
    # never arrive, and while SIGCHLD is ignored, the status of a child is lost. (Ignored signals
    # that end a process stay ignored, as nohup(1) needs it.)
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    sys.stdout = sys.stdout or _stream(1)
    sys.stderr = sys.stderr or _stream(2)
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _stream(fd: int) -> TextIO:
    return open(fd, "w", encoding="utf-8", closefd=False)


def _flush(stream: TextIO) -> None:
    # If a stream does not accept its data (a full disk, a closed pipe), that was reported before.
    # Data left in the buffer would make the interpreter fail at exit: status 120, and a traceback.
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
        print_diagnostic(usage_line(error))
        return USAGE
    except (click.Abort, KeyboardInterrupt):
        print_diagnostic("interrupted")
        return 128 + signal.SIGINT
    except DiffMergeError as error:
        print_diagnostic(error_line(error))
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output exited. There is nobody to report it to.
        return 128 + signal.SIGPIPE
    except SystemExit as error:
        # If the reader of stdout exited, click and rich exit with 1, which means 'no' here.
        if error.code != 1:
            raise
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None and isinstance(error, FileNotFoundError):  # of getcwd(2)
            text = "the current directory was removed; change to another one"
        else:
            text = f"{error.filename or 'output'}: {error.strerror or error}"
        print_diagnostic(error_line(FileAccessError(text)))
        return FileAccessError.exit_code
    except Exception as error:
        if package := missing_package(error):
            step = f"install it: {install_command(package)}"
            print_diagnostic(f"the Python package {package} is missing; {step}")
            return MissingExtraError.exit_code
        with suppress(OSError):
            traceback.print_exc()
        print_diagnostic("this is a bug in diffmergefs; please report it with the lines above")
        return BUG


class _PrintOnce(logging.Handler):
    # Prints a line only once: a command may open the same layers several times.

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._print = functools.cache(print_diagnostic)

    def emit(self, record: logging.LogRecord) -> None:
        self._print(record.getMessage())


@contextmanager
def _warnings_printed() -> Iterator[None]:
    # Warnings go to stderr (`mount` sets up its own log). core.layer logs that a layer changed; the
    # error that follows says so too.
    handler = _PrintOnce(logging.WARNING)
    handler.addFilter(lambda record: record.name != "diffmergefs.core.layer")
    log = logging.getLogger("diffmergefs")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _distrust_environment() -> None:
    # PATH, TMPDIR, HOME and the like could make us, our libraries or our children use files of
    # another user.
    known = _TERMINAL_VARIABLES | _SERVICE_VARIABLES
    kept = {k: v for k, v in os.environ.items() if k in known or k.startswith("LC_")}
    os.environ.clear()
    os.environ.update(kept, PATH=ROOTS_PATH)


def _escape_on_stdout() -> None:
    # A character that its encoding lacks is escaped.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    # An exception runs the `finally` blocks, which remove unfinished outputs. The default action of
    # a signal does not. Whoever calls `main` in a process of its own gets its handlers back.
    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signals = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_DFL]
    for number in signals:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_DFL)
