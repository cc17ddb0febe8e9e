"""Kernel settings of a FUSE mount: readahead, and the limit of background requests."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

from diffmergefs.core.beneath import closing_fd

log = logging.getLogger(__name__)

#: fusectl: a directory for each FUSE mount, writable for the user who mounted it.
CONNECTIONS = "/sys/fs/fuse/connections"
#: A directory for each mounted device, writable for root.
DEVICES = "/sys/class/bdi"

#: The best value for a restore: less takes more requests, more reads what no guest requested.
READAHEAD_KIB = 128
#: With this value a request is exactly what the guest touched: one page.
RECORDING_KIB = 4
#: As many as the daemon reads at once. The kernel's default of 12 is too low for slow storage.
MAX_BACKGROUND = 64


@dataclass(frozen=True)
class Tuning:
    """What the user wants for one mount; None leaves the choice to `tune`.

    `readahead` is in KiB. `max_background` limits the requests in flight that no process waits for,
    mainly readahead. `recording` says that first touches are recorded.
    """

    readahead: int | None = None
    max_background: int | None = None
    recording: bool = False


def tune(device: str, wanted: Tuning) -> int | None:
    """Apply the settings to the FUSE mount with this device number (`major:minor`).

    Returns the readahead in force in KiB, or None if it is unknown. Call it after the mount has
    answered its first request: until then the kernel overwrites the values. A setting that is not
    permitted (readahead requires root) stays as it is. The log says so, as a warning if the user
    asked for the value, or if it makes a record larger than what was touched. Never raises.
    """
    best = RECORDING_KIB if wanted.recording else READAHEAD_KIB
    found = _set(
        f"{DEVICES}/{device}/read_ahead_kb",
        wanted.readahead or best,
        "the readahead in KiB",
        wanted.readahead is not None,
    )
    background = wanted.max_background or MAX_BACKGROUND
    asked = wanted.max_background is not None
    folder = connection(device)
    # Above the threshold the kernel skips readahead. Three quarters is the kernel's own ratio.
    for name, value in (
        ("max_background", background),
        ("congestion_threshold", max(1, background * 3 // 4)),
    ):
        _set(f"{folder}/{name}", value, name, asked)
    if wanted.recording and found != RECORDING_KIB:
        log.warning(
            "the kernel reads ahead %s KiB, not %d: pages that it reads ahead are recorded as if"
            " the guest had touched them (only root can set it)",
            "an unknown number of" if found is None else found,
            RECORDING_KIB,
        )
    return found


def connection(device: str) -> str:
    """The fusectl directory of the mount with this device number (`major:minor`)."""
    # Its name is the device number in the kernel's own encoding.
    major, minor = map(int, device.split(":"))
    return f"{CONNECTIONS}/{major << 20 | minor}"


def _set(path: str, value: int, what: str, asked: bool) -> int | None:
    # A value that is right already is not written: an ordinary user may not write to it.
    report: Callable[..., None] = log.warning if asked else log.info
    found = None
    try:
        found = _read(path)
        if found == value:
            return found
        _write(path, value)
        found = _read(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        known = "as it is" if found is None else found
        report("%s: %s stays %s, not %d: %s", path, what, known, value, reason)
    else:
        if found != value:
            report("%s: the kernel made %s %d, not %d", path, what, found, value)
    return found


def _read(path: str) -> int:
    with open(path, encoding="ascii") as file:
        return int(file.read())


def _write(path: str, value: int) -> None:
    # One write, without O_TRUNC or O_CREAT: this is a kernel attribute, not a regular file.
    with closing_fd(os.open(path, os.O_WRONLY)) as fd:
        os.write(fd, b"%d" % value)
