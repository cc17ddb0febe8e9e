"""`umount` and `status`: unmount a view, or print the statistics of a mount."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import click

from diffmergefs.cli.options import MOUNTPOINT, json_option
from diffmergefs.cli.output import print_table, table
from diffmergefs.core import STATUS_FOLDER
from diffmergefs.core.errors import FileAccessError, MountFailedError, counted
from diffmergefs.fuse.status import STATUS_FILE, Status
from diffmergefs.system import children
from diffmergefs.system import mountpoint as mountpoints


@click.command()
@click.argument("mountpoint", type=MOUNTPOINT)
@click.option("--lazy", is_flag=True, help="Detach it even if files are open. They stay readable.")
def umount(mountpoint: str, lazy: bool) -> None:
    """Unmount MOUNTPOINT. Fail while files are open, unless you give --lazy.

    The error message names the processes that have files open or mapped, if they are visible.

    \b
    Example:
      diffmergefs umount /mnt/views
    """
    mountpoints.unmount(mountpoint, lazy=lazy)


@click.command()
@click.argument("mountpoint", type=MOUNTPOINT)
@json_option
@click.option("--watch", is_flag=True, help="Repeat until interrupted.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="The time between two updates with --watch.",
)
def status(mountpoint: str, as_json: bool, watch: bool, interval: float) -> None:
    """Print the statistics of the mount on MOUNTPOINT: requests, bytes by layer, latencies, errors.

    MOUNTPOINT/.diffmergefs/status.json has the same facts, and MOUNTPOINT/.diffmergefs/metrics has
    them as text for Prometheus. Only the mount's owner can read these files, and no
    listing of MOUNTPOINT contains them.

    \b
    Examples:
      diffmergefs status /mnt/views
      diffmergefs status --json /mnt/views | jq .reads
    """
    first = read_status(mountpoint)
    updates = _updates(mountpoint, first, interval) if watch else iter([first])
    with contextlib.suppress(*([KeyboardInterrupt] if watch else [])):
        if as_json:
            for found in updates:
                print(found.to_json(), end="", flush=True)
        elif watch and sys.stdout.isatty():
            _show_live(updates)
        else:
            for found in updates:
                for columns, rows in _tables(found):
                    print_table(columns, rows)
                sys.stdout.flush()


def read_status(mountpoint: str) -> Status:
    """The status of the mount.

    Raises MountpointError if it is not a diffmergefs mount point, MountFailedError if the daemon
    died, MountTimeoutError if the daemon hangs, and FileAccessError if the status cannot be read.
    """
    known = mountpoints.mount_at(mountpoint)
    file = os.path.join(known.path, STATUS_FOLDER, STATUS_FILE)
    try:
        return Status.from_json(children.ask(Path(file).read_bytes))
    except TimeoutError as error:
        raise mountpoints.no_answer(mountpoint, known) from error
    except OSError as error:
        if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
            raise MountFailedError(
                f"{mountpoint}: stale mount: its daemon died; unmount it or mount it again"
            ) from error
        why = "; only the user who mounted it may read it" if error.errno == errno.EACCES else ""
        raise FileAccessError(f"{file}: {error.strerror}{why}") from error
    except ValueError as error:
        raise FileAccessError(
            f"{file}: {error}; another version of diffmergefs serves this mount"
        ) from error


def _updates(mountpoint: str, first: Status, interval: float) -> Iterator[Status]:
    yield first
    while True:
        time.sleep(interval)
        yield read_status(mountpoint)


def _show_live(updates: Iterator[Status]) -> None:
    from rich.console import Console, Group
    from rich.live import Live

    with Live(console=Console(), auto_refresh=False) as live:
        for found in updates:
            live.update(Group(*(table(*each) for each in _tables(found))), refresh=True)


def _tables(found: Status) -> Iterator[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    yield ("WHAT", "NOW"), list(_facts(found))
    if found.supplied:
        yield (
            ("TAG", "LAYER", ">BYTES"),
            [
                (each.tag, "hole" if each.layer is None else str(each.layer), str(each.bytes))
                for each in found.supplied
            ],
        )


def _facts(found: Status) -> Iterator[tuple[str, str]]:
    up = timedelta(seconds=max(0, int(time.time() - found.started)))
    yield "daemon", f"pid {found.pid}, version {found.version}, up {up}"
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
    yield "prefetch", f"{found.prefetch_pushed_bytes} bytes pushed, {found.prefetch_hit_bytes} hit"
    yield "tainted", counted(found.tainted_layers, "layer")


def _quantile(found: Status, share: float) -> str:
    # The upper end of the bucket: nothing finer is known.
    for bucket in found.read_buckets:
        if bucket.reads >= share * found.reads:
            return f"{bucket.seconds * 1e6:.0f} us"
    return f"more than {found.read_buckets[-1].seconds:.0f} s"
