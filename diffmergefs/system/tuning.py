"""What the kernel lets a mounter set for its own mount: readahead, and requests under way."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger(__name__)

#: For each FUSE mount a directory that its mounter may write to (fusectl).
CONNECTIONS = "/sys/fs/fuse/connections"
#: For each mounted device a directory that root may write to.
DEVICES = "/sys/class/bdi"

#: What a restore gains most from: less costs more requests, more reads what no guest asked for.
READAHEAD_KIB = 128
#: Then a request is what the guest touched: one page.
RECORDING_KIB = 4
#: As many as the daemon reads at once; the kernel's own limit, 12, makes slow storage wait.
MAX_BACKGROUND = 64


@dataclass(frozen=True)
class Tuning:
    """What is asked of the kernel for one mount; None leaves it to `tune` what is best.

    `readahead` is in KiB, `max_background` the number of requests that nobody waits for yet,
    readahead above all, under way at once. `recording` says that first touches are recorded.
    """

    readahead: int | None = None
    max_background: int | None = None
    recording: bool = False


def tune(device: str, wanted: Tuning) -> int | None:
    """Set what is wanted for the FUSE mount with this device number (`major:minor`).

    Gives the readahead in force, in KiB, None where that cannot be told. Call it once the mount
    has answered its first request: until then the kernel has the last word. What is not
    permitted (the readahead takes root) stays as it is, and the log says so: as a warning if it was
    asked for, or if it makes a record larger than what was touched. Never raises.
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
    # Beyond the threshold the kernel leaves readahead out; three quarters, as it has them itself.
    for name, value in (
        ("max_background", background),
        ("congestion_threshold", max(1, background * 3 // 4)),
    ):
        _set(f"{folder}/{name}", value, name, asked)
    if wanted.recording and found != RECORDING_KIB:
        log.warning(
            "the kernel reads ahead %s KiB, not %d: what it reads ahead is recorded as if it had"
            " been touched (only root can set it)",
            "an unknown number of" if found is None else found,
            RECORDING_KIB,
        )
    return found


def connection(device: str) -> str:
    """The directory of the mount with this device number (`major:minor`) in fusectl."""
    # It is named by the device number as the kernel keeps it.
    major, minor = map(int, device.split(":"))
    return f"{CONNECTIONS}/{major << 20 | minor}"


def _set(path: str, value: int, what: str, asked: bool) -> int | None:
    # What is so already is not touched: an ordinary user has the default without any right.
    said: Callable[..., None] = log.warning if asked else log.info
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
        said("%s: %s stays %s, not %d: %s", path, what, known, value, reason)
    else:
        if found != value:
            said("%s: the kernel made %s %d, not %d", path, what, found, value)
    return found


def _read(path: str) -> int:
    with open(path, encoding="ascii") as file:
        return int(file.read())


def _write(path: str, value: int) -> None:
    # In one write and without O_TRUNC or O_CREAT: it is a knob, not a file.
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, b"%d" % value)
    finally:
        os.close(fd)
