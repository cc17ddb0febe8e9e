"""`doctor`, and the temporary mount that it and `demo` try on this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO

import click

from diffmergefs.checks.diagnosis import Finding
from diffmergefs.checks.doctor import examine_path
from diffmergefs.checks.host import NO_MOUNT, examine_host
from diffmergefs.checks.userfault import examine_userfault
from diffmergefs.cli.options import (
    PATH,
    page_size_option,
    state_dir_option,
    store_options,
    with_policy,
)
from diffmergefs.cli.output import print_diagnostic, print_json, printable, progress
from diffmergefs.cli.usage import Verb, error_line
from diffmergefs.core.errors import (
    DiffMergeError,
    FileAccessError,
    MountFailedError,
    MountTimeoutError,
    counted,
)
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.system import children, mounted
from diffmergefs.system.children import ask
from diffmergefs.system.daemon import ADDRESS
from diffmergefs.system.mounttable import FILESYSTEM_TYPE, mount_entry

_READY_SECONDS = 60.0
_END_SECONDS = 5.0
_SERVE = "from diffmergefs.cli import main; sys.exit(main())"
_CONTENT = bytes(range(256)) * 16
_APART = "from diffmergefs.system.mounttable import enter_own_namespace as enter; enter(); "
_REMEDY = (
    "fix the findings above about the kernel, the device and the helper; a container needs --device"
    " /dev/fuse, --cap-add SYS_ADMIN, and AppArmor and seccomp profiles that allow mounting"
)
_finding = partial(Finding, "host", "mount")


@click.command(cls=Verb)
@click.argument("paths", metavar="[PATH...]", nargs=-1, type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@with_policy
@page_size_option
@state_dir_option
@store_options
def doctor(paths: tuple[str, ...], as_json: bool, policy: TrustPolicy) -> int:
    """Check whether this machine, and the filesystem and diffs of each PATH, are suitable.

    PATH is a directory of snapshots, a snapshot, a layer file, or a directory for new diffs. Its
    filesystem is tested with a temporary file, and each layer with all checks of `mount` and
    `flatten`. A finding that is not fine says why it matters and what you can do. A view is mounted
    briefly, and invisibly to others. Each filesystem is tested once. An error in one PATH does not
    stop the checks of the others, except a PATH in a diffmergefs mount that hangs, which ends the
    command. The exit code is 1 if anything would give wrong bytes, or if nothing can be mounted,
    otherwise 0.

    \b
    Examples:
      diffmergefs doctor
      diffmergefs doctor /srv/snapshots
      diffmergefs doctor --json mem_diff | jq -r '.[] | select(.severity == "wrong").finding'
    """
    findings = [*examine_host(), *examine_userfault(), try_mount()]
    tested: set[int] = set()
    failed = 0
    for path in paths:
        try:
            with progress(f"examine {printable(path)}", unit=""):
                findings += examine_path(path, policy, tested)
        except DiffMergeError as error:
            print_diagnostic(error_line(error))
            failed = failed or error.exit_code
    findings = list(dict.fromkeys(findings))  # a layer may belong to several of the paths
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        print("\n".join(_lines(findings)))
    return 1 if any(f.severity == "wrong" for f in findings) else failed


def _lines(findings: list[Finding]) -> Iterator[str]:
    for subject in dict.fromkeys(finding.subject for finding in findings):
        yield printable(subject)
        for finding in (each for each in findings if each.subject == subject):
            yield f"  {finding.severity:8} {printable(finding.finding)}"
            if finding.why:
                yield f"{'':11}why: {printable(finding.why)}"
                yield f"{'':11}remedy: {printable(finding.remedy)}"
    found = [finding.severity for finding in findings]
    warnings = counted(found.count("warning"), "warning")
    yield f"{found.count('wrong')} wrong, {warnings}, {found.count('fine')} fine"


def try_mount() -> Finding:
    """Mount a view of one page briefly and read it. Return the finding; never raise.

    The mount is in a temporary directory, and as root in a mount namespace of its own.
    """
    try:
        temporary = tempfile.TemporaryDirectory(
            prefix="diffmergefs-doctor-", ignore_cleanup_errors=True
        )
    except OSError as error:
        return _finding(
            "warning",
            f"mounting could not be tested: {error}",
            "only the findings above show whether something can be mounted",
            "run doctor where it can create a temporary directory",
        )
    try:
        with temporary as folder:
            found = _read_view(Path(os.path.realpath(folder)))
    except (DiffMergeError, OSError) as error:
        return _no_mount(f"a view cannot be mounted: {error}")
    if found != _CONTENT:
        return _no_mount("a view was mounted, but has wrong bytes")
    return _finding("fine", "a view was mounted and read")


def _no_mount(text: str) -> Finding:
    return _finding("wrong", text, NO_MOUNT, _REMEDY)


def _read_view(folder: Path) -> bytes:
    base, view = folder / "base.mem", folder / "view"
    base.write_bytes(_CONTENT)
    view.mkdir()
    is_root = os.geteuid() == 0
    options = (f"--state-dir={folder / 'state'}", f"--base={base}", "--prefetch=no")
    with temporary_mount(view, *options, before=_APART if is_root else "") as pid:
        # As root, only the serving process sees the mount.
        file = Path(f"/proc/{pid}/root{view}" if is_root else view, base.name)
        try:
            return ask(file.read_bytes)
        except OSError as error:
            raise FileAccessError(f"{file}: {error}") from error


@contextmanager
def temporary_mount(mountpoint: Path, *arguments: str, before: str = "") -> Iterator[int]:
    """Run `mount -f *arguments mountpoint`, and yield its pid when the mount answers.

    `before` is Python code that the process runs first. At the end the mount and the process are
    removed, even if the mount is in use. Raises MountFailedError with the process's message, and
    MountTimeoutError.
    """
    with (
        tempfile.TemporaryFile() as output,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready,
    ):
        ready.bind("")  # the kernel finds a free abstract name
        child = children.start_code(
            before + _SERVE,
            *("mount", "-f", *arguments, "--", str(mountpoint)),
            stdout=output,
            stderr=output,
            env=os.environ | {ADDRESS: "@" + ready.getsockname()[1:].decode()},
        )
        try:
            _wait_until_ready(child, ready, output, mountpoint)
            yield child.pid
        finally:
            _end(child)
            _detach(mountpoint)


def _wait_until_ready(
    child: subprocess.Popen[bytes], ready: socket.socket, output: IO[bytes], mountpoint: Path
) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    ready.settimeout(0.05)
    while True:
        with suppress(TimeoutError):
            if ready.recv(4096) == b"READY=1":
                return
        if child.poll() is not None:
            raise MountFailedError(_last_line(output) or f"ended with status {child.returncode}")
        if time.monotonic() > deadline:
            raise MountTimeoutError(f"{mountpoint}: no answer within {_READY_SECONDS:g} s")


def _last_line(output: IO[bytes]) -> str:
    output.seek(0)
    lines = os.fsdecode(output.read()).strip().split("\n")
    return lines[-1].removeprefix("diffmergefs: ")


def _end(child: subprocess.Popen[bytes]) -> None:
    # After the first signal it still serves open files, after the second it does not.
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        child.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(_END_SECONDS)
            return


def _detach(mountpoint: Path) -> None:
    known = mount_entry(str(mountpoint))
    if known is not None and known.kind == FILESYSTEM_TYPE:
        mounted.detach(known.path)
