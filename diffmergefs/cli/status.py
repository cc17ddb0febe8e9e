"""`status`: what a mount says of itself."""

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
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from diffmergefs.cli.options import MOUNTPOINT, json_option
from diffmergefs.cli.output import new_table, print_table, printable
from diffmergefs.core import STATUS_FOLDER
from diffmergefs.core.errors import FileAccessError, MountFailedError, MountpointError
from diffmergefs.fuse.status import STATUS_FILE, Status
from diffmergefs.system import asking
from diffmergefs.system import mountpoint as mountpoints


@click.command()
@click.argument("mountpoint", type=MOUNTPOINT)
@json_option
@click.option("--watch", is_flag=True, help="Print them again and again, until interrupted.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait between two looks, with --watch.",
)
def status(mountpoint: str, as_json: bool, watch: bool, interval: float) -> None:
    """What the mount on MOUNTPOINT has done so far: requests, bytes by layer, latencies, errors.

    The same facts stand in MOUNTPOINT/.diffmergefs/status.json, and for Prometheus, as OpenMetrics
    text, in MOUNTPOINT/.diffmergefs/metrics. Both are for the mount's owner, and in no listing of
    MOUNTPOINT.

    \b
    Examples:
      diffmergefs status /mnt/views
      diffmergefs status --json /mnt/views | jq .reads
    """
    first = read_status(mountpoint)
    looks = _looks(mountpoint, first, interval) if watch else iter([first])
    with contextlib.suppress(*([KeyboardInterrupt] if watch else [])):
        if as_json:
            for found in looks:
                print(found.to_json(), end="", flush=True)
        elif watch and sys.stdout.isatty():
            _show_live(looks)
        else:
            for found in looks:
                for table in _tables(found):
                    print_table(table)
                sys.stdout.flush()


def read_status(mountpoint: str) -> Status:
    """The status of the mount.

    Raises MountpointError where no diffmergefs is mounted, MountFailedError for a mount whose
    daemon died, MountTimeoutError for one whose daemon hangs, FileAccessError where it may not be
    read.
    """
    path = mountpoints.resolved(mountpoint)
    known = mountpoints.mount_entry(path)
    if known is None or known.kind != mountpoints.FILESYSTEM_TYPE:
        found = f"a {known.kind} is mounted there" if known else "nothing is mounted there"
        raise MountpointError(f"{mountpoint}: no diffmergefs mount, {found}")
    file = os.path.join(path, STATUS_FOLDER, STATUS_FILE)
    try:
        return Status.from_json(asking.ask(Path(file).read_bytes))
    except TimeoutError as error:
        raise mountpoints.no_answer(mountpoint, known) from error
    except OSError as error:
        if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
            raise MountFailedError(
                f"{mountpoint}: a stale mount, its daemon died; unmount it or mount it again"
            ) from error
        why = "; only the user who mounted it may look" if error.errno == errno.EACCES else ""
        raise FileAccessError(f"{file}: {error.strerror}{why}") from error
    except ValueError as error:
        raise FileAccessError(f"{file}: {error}; another version serves this mount") from error


def _looks(mountpoint: str, first: Status, interval: float) -> Iterator[Status]:
    yield first
    while True:
        time.sleep(interval)
        yield read_status(mountpoint)


def _show_live(looks: Iterator[Status]) -> None:
    with Live(console=Console(), auto_refresh=False) as live:
        for found in looks:
            live.update(Group(*_tables(found)), refresh=True)


def _tables(found: Status) -> list[Table]:
    facts = new_table("WHAT", "NOW")
    for name, text in _facts(found):
        facts.add_row(name, text)
    supplied = new_table("TAG", "LAYER", ">BYTES")
    for each in found.supplied:
        layer = "hole" if each.layer is None else str(each.layer)
        supplied.add_row(printable(each.tag), layer, str(each.bytes))
    return [facts, supplied] if found.supplied else [facts]


def _facts(found: Status) -> Iterator[tuple[str, str]]:
    up = timedelta(seconds=max(0, int(time.time() - found.started)))
    yield "daemon", f"pid {found.pid}, version {found.version}, up {up}"
    yield "read loop", "fast" if found.fast_loop else "pyfuse3's own"
    yield "open", f"{found.open_images} images, {found.open_files} files"
    requests = [f"{each.operation} {each.requests}" for each in found.operations]
    yield "requests", ", ".join(requests) or "none"
    errors = [
        f"{each.operation} {name} {count}"
        for each in found.operations
        for name, count in each.errors.items()
    ]
    yield "errors", ", ".join(errors) or "none"
    yield "reads", f"{found.reads}, of which {found.reads_in_threads} waited for their bytes"
    if found.reads:
        shares = [f"{share} % in {_quantile(found, share / 100)}" for share in (50, 99)]
        yield "latency", ", ".join(shares)
    yield "prefetch", f"{found.prefetch_pushed_bytes} bytes pushed, {found.prefetch_hit_bytes} hit"
    yield "tainted", f"{found.tainted_layers} layers"


def _quantile(found: Status, share: float) -> str:
    # The bucket's upper end: nothing finer is known.
    for bucket in found.read_buckets:
        if bucket.reads >= share * found.reads:
            return f"{bucket.seconds * 1e6:.0f} us"
    return f"more than {found.read_buckets[-1].seconds:.0f} s"
