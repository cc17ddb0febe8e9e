"""The command line: verbs, output, exit codes. Only this package prints."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from types import FrameType

import click

from diffmergefs import __version__
from diffmergefs.cli import demo, look, mount, write
from diffmergefs.cli.common import talk
from diffmergefs.errors import DiffMergeError

USAGE = 2
BUG = 70


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
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


for command in (
    mount.mount,
    mount.umount,
    look.list_,
    look.info,
    write.flatten,
    write.apply,
    demo.demo,
):
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code. A user's mistake is one line, a bug a traceback."""
    _end_on_signals()
    try:
        answer = cli.main(arguments, prog_name="diffmergefs", standalone_mode=False)
        sys.stdout.flush()
        return answer if isinstance(answer, int) else 0
    except click.ClickException as error:
        error.show()
        return USAGE
    except (click.Abort, KeyboardInterrupt):
        talk("interrupted")
        return 128 + signal.SIGINT
    except DiffMergeError as error:
        talk(str(error))
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output went away; nothing more can be said there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception:
        traceback.print_exc()
        talk("this is a bug in diffmergefs; please report it with the lines above")
        return BUG


def _end_on_signals() -> None:
    # So that outputs in the making are removed: an exception runs the `finally` blocks, a signal's
    # default action does not.
    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
