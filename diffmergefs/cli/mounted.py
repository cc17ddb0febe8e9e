"""`umount` and `status`: unmount a view, list the mounts, or print the statistics of one."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TypeVar

import click

from diffmergefs.cli import servers
from diffmergefs.cli.options import MOUNTPOINT, complete_mountpoints, json_option
from diffmergefs.cli.output import print_diagnostic, print_json, print_table, sized, table
from diffmergefs.cli.usage import Verb, error_line
from diffmergefs.core import STATUS_FOLDER
from diffmergefs.core.errors import (
    DiffMergeError,
    FileAccessError,
    MountFailedError,
    MountTimeoutError,
    counted,
)
from diffmergefs.fuse.status import METRICS_FILE, STATUS_FILE, Status
from diffmergefs.system import children, mounted
from diffmergefs.system import mountpoint as mountpoints
from diffmergefs.system.mounttable import Mount
from diffmergefs.uffd.status import Status as ServerStatus

T = TypeVar("T")

_MOST_BYTES = 1 << 26  # of a status; a user's server could answer without an end


@click.command(cls=Verb)
@click.argument("mountpoint", type=MOUNTPOINT, shell_complete=complete_mountpoints)
@click.option("--lazy", is_flag=True, help="Detach it even if files are open. They stay readable.")
def umount(mountpoint: str, lazy: bool) -> None:
    """Unmount MOUNTPOINT. Fail while files are open, unless you give --lazy.

    The error message names the processes that have files open or mapped, if they are visible.
    `unmount` is another name of this command.

    \b
    Example:
      diffmergefs umount /mnt/views
    """
    mounted.unmount(mountpoint, lazy=lazy)


@click.command(cls=Verb)
@click.argument(
    "mountpoint",
    required=False,
    type=MOUNTPOINT,
    shell_complete=complete_mountpoints,
    metavar="[MOUNTPOINT|SOCKET]",
)
@json_option
@click.option("--metrics", is_flag=True, help="Print the statistics as text for Prometheus.")
@click.option("--watch", is_flag=True, help="Repeat until interrupted.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="The time between two updates with --watch.",
)
def status(
    mountpoint: str | None, as_json: bool, metrics: bool, watch: bool, interval: float
) -> int:
    """List your mounts and page servers, or print the statistics of one.

    The list has a line for each of your mounts, and for each page server (`uffd`); root gets those
    of all users. They are asked at the same time, and have 5 seconds to answer. The exit code is 1
    if one of them does not answer.

    The statistics are requests, bytes by layer, latencies and errors.
    MOUNTPOINT/.diffmergefs/status.json has the same facts, and MOUNTPOINT/.diffmergefs/metrics has
    them as text for Prometheus. Only the mount's owner can read these files, and no listing of
    MOUNTPOINT contains them. SOCKET is that of a page server.

    \b
    Examples:
      diffmergefs status
      diffmergefs status /mnt/views
      diffmergefs status --json /mnt/views | jq .reads
    """
    if metrics:
        if mountpoint is None or as_json or watch:
            raise click.UsageError("--metrics goes with MOUNTPOINT or SOCKET alone")
        print(read_metrics(mountpoint), end="")
        return 0
    look: Callable[[], _Found]
    look = _list_all if mountpoint is None else (lambda: _read_one(mountpoint))
    found = first = look()
    updates = _updates(look, first, interval) if watch else iter([first])
    with contextlib.suppress(*([KeyboardInterrupt] if watch else [])):
        if not as_json and watch and sys.stdout.isatty():
            _show_live(updates)
        else:
            for found in updates:
                _print(found, as_json)
    if isinstance(found, list):
        print_diagnostic(*(each.problem for each in found if each.problem))
        return 0 if all(each.status for each in found) else 1
    return 0


def _list_all() -> list[Listed | servers.ListedServer]:
    return [*list_mounts(), *servers.list_servers()]


def _read_one(path: str) -> Status | ServerStatus:
    return servers.read_server(path) if servers.is_socket(path) else read_status(path)


def _print(found: _Found, as_json: bool) -> None:
    if not as_json:
        for columns, rows in _tables(found):
            print_table(columns, rows)
    elif isinstance(found, list):
        print_json([asdict(each) for each in found])
    else:
        print(found.to_json(), end="")
    sys.stdout.flush()


@dataclass(frozen=True)
class Listed:
    """A mount in the output of `status`, `user` by its uid.

    `state` is 'serving', 'stale' (its daemon died), 'hung' (no answer), or 'unreadable'. In all but
    the first, `problem` is the whole message, and `status` is None.
    """

    mountpoint: str
    source: str
    user: int | None
    state: str
    problem: str | None
    status: Status | None


_Found = Status | ServerStatus | list[Listed | servers.ListedServer]
_STATES = {MountFailedError: "stale", MountTimeoutError: "hung", FileAccessError: "unreadable"}


def list_mounts() -> list[Listed]:
    """The mounts of this user, or those of all users for root, by their mountpoints."""
    own = os.geteuid()
    known = sorted(mounted.mounts_of(own or None), key=lambda mount: mount.path)
    answers = children.ask_all([functools.partial(_read, mount) for mount in known])
    found = []
    for mount, answer in zip(known, answers, strict=True):
        user = mount.owner[0] if mount.owner else None
        try:
            status = _parsed(mount.path, mount, answer)
        except DiffMergeError as error:
            state, problem = _STATES[type(error)], error_line(error)
            found.append(Listed(mount.path, mount.source, user, state, problem, None))
        else:
            found.append(Listed(mount.path, mount.source, user, "serving", None, status))
    return found


def read_status(mountpoint: str) -> Status:
    """The status of the mount.

    Raises MountpointError if it is not a diffmergefs mount point, MountFailedError if the daemon
    died, MountTimeoutError if the daemon hangs, and FileAccessError if the status cannot be read.
    """
    known = mounted.mount_at(mountpoint)
    try:
        answer: bytes | OSError = children.ask(functools.partial(_read, known))
    except OSError as error:
        answer = error
    return _parsed(mountpoint, known, answer)


def read_metrics(path: str) -> str:
    """The text for Prometheus of a mount, or of the page server with this socket.

    Raises as `read_status` and `servers.read_server`.
    """
    if servers.is_socket(path):
        return servers.exposition_of(path, METRICS_FILE).decode()
    known = mounted.mount_at(path)
    try:
        return children.ask(functools.partial(_read, known, METRICS_FILE)).decode()
    except OSError as error:
        raise _failure(path, known, error) from error


def _file(mount: Mount, name: str = STATUS_FILE) -> str:
    return os.path.join(mount.path, STATUS_FOLDER, name)


def _read(mount: Mount, name: str = STATUS_FILE) -> bytes:
    # In a child process. The kernel lets nobody but its owner into a mount, not even root.
    if mount.owner and mount.owner[0] != os.geteuid() == 0:
        user, group = mount.owner
        os.setgroups([])
        os.setresgid(group, group, group)
        os.setresuid(user, user, user)
    with open(_file(mount, name), "rb") as file:
        return file.read(_MOST_BYTES)


def _parsed(mountpoint: str, known: Mount, answer: bytes | OSError) -> Status:
    # The status that a child process read, or the error that it had. Raises as `read_status`.
    if isinstance(answer, OSError):
        raise _failure(mountpoint, known, answer)
    try:
        return Status.from_json(answer)
    except ValueError as error:
        raise FileAccessError(
            f"{_file(known)}: {error}; another version of diffmergefs serves this mount"
        ) from error


def _failure(mountpoint: str, known: Mount, error: OSError) -> DiffMergeError:
    if isinstance(error, TimeoutError):
        return mountpoints.no_answer(mountpoint, known)
    if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
        return MountFailedError(
            f"{mountpoint}: stale mount: its daemon died; unmount it or mount it again"
        )
    why = "; only the user who mounted it may read it" if error.errno == errno.EACCES else ""
    return FileAccessError(f"{_file(known)}: {error.strerror}{why}")


def _updates(look: Callable[[], T], first: T, interval: float) -> Iterator[T]:
    yield first
    while True:
        time.sleep(interval)
        yield look()


def _show_live(updates: Iterator[_Found]) -> None:
    from rich.console import Console, Group
    from rich.live import Live

    with Live(console=Console(), auto_refresh=False) as live:
        for found in updates:
            live.update(Group(*(table(*each) for each in _tables(found))), refresh=True)


def _tables(
    found: _Found,
) -> Iterator[tuple[tuple[str, ...], Sequence[tuple[object, ...]]]]:
    if isinstance(found, ServerStatus):
        yield from servers.tables(found, _up(found))
        return
    if isinstance(found, list):
        mounts = [each for each in found if isinstance(each, Listed)]
        others = [each for each in found if isinstance(each, servers.ListedServer)]
        columns = ("MOUNTPOINT", "SOURCE", "USER", "STATE", ">PID", ">UP", ">OPEN FILES")
        yield columns, list(map(_row, mounts))
        if others:
            rows = [servers.row(each, _up(each.status) if each.status else None) for each in others]
            yield servers.COLUMNS, rows
        return
    yield ("WHAT", "NOW"), list(_facts(found))
    if found.supplied:
        yield (
            ("TAG", "LAYER", "=BYTES"),
            [
                (each.tag, "hole" if each.layer is None else each.layer, each.bytes)
                for each in found.supplied
            ],
        )


def _row(each: Listed) -> tuple[object, ...]:
    numbers = (each.status.pid, _up(each.status), each.status.open_files) if each.status else ()
    return each.mountpoint, each.source, each.user, each.state, *numbers


def _up(found: Status | ServerStatus) -> timedelta:
    return timedelta(seconds=max(0, int(time.time() - found.started)))


def _facts(found: Status) -> Iterator[tuple[str, str]]:
    yield "daemon", f"pid {found.pid}, version {found.version}, up {_up(found)}"
    service = found.service
    covered = "another one goes on" if service.covered else f"the mount ends ({service.obstacle})"
    yield "server", f"pid {service.server}; if it dies, {covered}"
    if service.servers > 1:
        stall = f"longest stall {service.longest_stall_seconds * 1e3:.0f} ms"
        yield (
            "replaced",
            f"{counted(service.servers - 1, 'time')}, {stall}; the last time {service.last_end}",
        )
    yield "read loop", "fast" if found.fast_loop else "pyfuse3's own"
    yield "open", f"{counted(found.open_images, 'image')}, {counted(found.open_files, 'file')}"
    requests = [f"{each.operation} {each.requests}" for each in found.operations]
    yield "requests", ", ".join(requests) or "none"
    errors = [
        f"{each.operation} {name} {count}"
        for each in found.operations
        for name, count in each.errors.items()
    ]
    yield "errors", ", ".join(errors) or "none"
    yield "reads", f"{found.reads}, of which {found.reads_in_threads} in worker threads"
    if found.reads:
        shares = [f"{share} % in {_quantile(found, share / 100)}" for share in (50, 99)]
        yield "latency", ", ".join(shares)
    pushed, hit = sized(found.prefetch_pushed_bytes, "bytes"), sized(found.prefetch_hit_bytes)
    yield "prefetch", f"{pushed} pushed, {hit} hit"
    yield "tainted", counted(found.tainted_layers, "layer")


def _quantile(found: Status, share: float) -> str:
    # The upper end of the bucket: nothing finer is known.
    for bucket in found.read_buckets:
        if bucket.reads >= share * found.reads:
            return f"{bucket.seconds * 1e6:.0f} us"
    return f"more than {found.read_buckets[-1].seconds:.0f} s"
