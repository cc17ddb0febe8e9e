"""Making a mount: its options, and why it cannot be made."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyfuse3

from diffmergefs.checks.host import obstacles
from diffmergefs.core.beneath import closing_fd
from diffmergefs.core.errors import MountFailedError
from diffmergefs.system.mountpoint import FUSE_CONF, others_may_be_let_in

log = logging.getLogger(__name__)

_NOT_WRITABLE = ("no write access to mountpoint", "not owned by user")  # fusermount3's words


def session_options(
    source: str, extra: Sequence[str], *, allow_other: bool, open_rw: bool
) -> set[str]:
    """The mount options of a session that shows `source`. `extra` are further ones for libfuse."""
    options = {_escaped(option) for option in (f"fsname={source}", *extra)}
    options |= {"subtype=diffmergefs", "default_permissions", "nosuid", "nodev", "noexec"}
    if allow_other:
        options.add("allow_other")
    if not open_rw:
        options.add("ro")
    return options


def _escaped(option: str) -> str:
    # libfuse splits options at commas.
    return option.replace("\\", "\\\\").replace(",", "\\,")


def mount(operations: pyfuse3.Operations, mountpoint: str, options: set[str]) -> None:
    """Mount on `mountpoint`, to be served by `operations`; `options` are of `session_options`.

    What libfuse says goes to the log, and nowhere else. Raises MountFailedError with the cause and
    the next step.
    """
    with closing_fd(os.memfd_create("stderr")) as said:
        try:
            with _stderr_to(said):
                pyfuse3.init(operations, mountpoint, set(map(_Option, options)))
        except RuntimeError as error:
            reason = _reason([*_lines(said), str(error)], options)
            raise MountFailedError(f"{mountpoint}: cannot be mounted: {reason}") from error
        for line in _lines(said):
            log.warning("%s", line)


@contextmanager
def _stderr_to(fd: int) -> Iterator[None]:
    # libfuse and fusermount3 write the reason of a failure to descriptor 2.
    with closing_fd(os.dup(2)) as stderr:
        os.dup2(fd, 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)


def _lines(fd: int) -> list[str]:
    return os.pread(fd, 1 << 16, 0).decode(errors="replace").splitlines()


def _reason(said: Sequence[str], options: set[str]) -> str:
    # The cause and the remedy. The last line is pyfuse3's, which knows no cause.
    asked = {"allow_other", "allow_root"} & options
    if asked and os.geteuid() != 0 and not others_may_be_let_in():
        return (
            f"--allow-other needs the line user_allow_other in {FUSE_CONF}, unless root mounts; ask"
            " root to add it, or omit --allow-other"
        )
    if known := obstacles():
        return "; ".join(known)
    cause = next((line for line in said if line.startswith(("fuse: ", "fusermount3: "))), said[-1])
    if any(words in cause for words in _NOT_WRITABLE):
        return f"{cause}; mount on a directory that this user owns"
    return f"{cause}; `diffmergefs doctor` shows what mounting needs"


class _Option(str):
    # pyfuse3 encodes options as ASCII, but the path in fsname may hold any byte.

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return os.fsencode(str(self))
