"""Servers die while they push a working set, record one, or ask for a lease: nobody waits"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from diffmergefs.prefetch.push import pieces
from diffmergefs.prefetch.record import WorkingSets
from tests.support import skips
from tests.support.images import PAGE
from tests.support.live import held, patch_children, until
from tests.support.moments import IN_MOUNTS, Moments
from tests.support.mounts import abort, mounted, require_fusectl
from tests.support.processes import has_no_thread, is_dead, is_stuck
from tests.support.restores import ORACLE, SIZE, ranges_of, save, scattered, shown, write_pair
from tests.support.servers import TOOK_OVER, covered, kill_and_wait, kill_server, wait_for_takeovers
from tests.support.stores import write_tag
from tests.support.writers import is_leased

__all__ = ["covered"]

needs_resend = pytest.mark.usefixtures("covered")

TOUCHED = scattered(25)
LAST = pieces(ranges_of(TOUCHED), SIZE)[-1].start
CUT_OFF = "and no other can go on"

# A client's read waits until there is a file; those of the push do not, and so it comes to the very
# page that the client waits for, and waits in the kernel, where no signal reaches it.
SLOW_READS = """
    import os, threading, time
    import diffmergefs.prefetch.push as module
    from diffmergefs.core.view import MergedView
    fill = MergedView.fill
    def slow(self, *rest):
        while threading.current_thread().name != "prefetch" and not os.path.exists({go!r}):
            time.sleep(0.01)
        return fill(self, *rest)
    MergedView.fill_nowait = lambda *rest: 0
    MergedView.fill = slow
    real = module.Notify.__init__
    def init(self, store, *rest):
        def stored(inode, offset, data):
            time.sleep(0.02)
            store(inode, offset, data)
        real(self, stored, *rest)
    module.Notify.__init__ = init
"""
NO_RESEND = """
    from diffmergefs.fuse.device import Device
    Device.resends = property(lambda self: False)
"""
READ = f"""
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
sys.stdout.buffer.write(os.pread(fd, {PAGE}, {LAST}))
"""


@pytest.mark.parametrize("resend", [True, False], ids=["resend", "no resend"])
def test_a_push_that_waits_for_a_page_in_hand(
    resend: bool,
    public_path: Path,
    mountpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: Callable[[int], int],
    seen: Callable[..., None],
) -> None:
    """The dead one cannot be reaped: the next brings the page (or the reader gets an error)"""
    if resend:
        skips.require_resend()
    require_fusectl()
    base, diff = write_pair(public_path)
    sets = WorkingSets(str(public_path / "sets"))
    save(sets, shown(base, diff), TOUCHED)
    go, view = public_path / "go", mountpoint / "base.mem"
    options = ["--base", str(base), "--diff", str(diff), "--prefetch=notify"]
    options += ["--working-set-dir", sets.directory]
    code = SLOW_READS.format(go=str(go)) + ("" if resend else NO_RESEND)
    patch_children(monkeypatch, public_path / "site", IN_MOUNTS + code)
    kills, longest = count(100), 0.0
    mount_times = 1 if resend else kills
    for _ in range(mount_times):
        with mounted(None, mountpoint, *options, expect_log=(TOOK_OVER, CUT_OFF)) as mount:
            for number in range(kills // mount_times):
                go.unlink(missing_ok=True)
                reader = subprocess.Popen(
                    [sys.executable, "-c", READ, str(view)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
                try:
                    server = mount.pid
                    until(partial(is_stuck, server), "the push did not come to that page")
                    began = time.monotonic()
                    kill_server(mount)
                    until(partial(is_dead, server), "it did not die")
                    if resend:
                        wait_for_takeovers(mount, number + 1)
                        go.touch()
                    found, text = reader.communicate(timeout=20)
                    longest = max(longest, time.monotonic() - began)
                    # The push that is let go may still bring the page, and before the reader looks.
                    is_right = found == ORACLE[LAST : LAST + PAGE]
                    assert is_right or (not resend and not found and b"OSError" in text)
                    until(partial(has_no_thread, server), "a thread of it hangs")
                finally:
                    go.touch()
                    reader.kill()
                    reader.communicate(timeout=60)
            if resend:
                assert view.read_bytes() == ORACLE
            else:
                assert mount.process.wait(60) == 23
    seen(kills=kills, longest_until_the_reader_had_its_page_or_error_ms=round(1000 * longest))


def test_a_push_that_waits_for_a_page_when_nobody_is_left(
    public_path: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process can end it, and so `umount -f` does"""
    base, diff = write_pair(public_path)
    sets = WorkingSets(str(public_path / "sets"))
    save(sets, shown(base, diff), TOUCHED)
    options = ["--base", str(base), "--diff", str(diff), "--prefetch=notify"]
    options += ["--working-set-dir", sets.directory]
    code = SLOW_READS.format(go=str(public_path / "go"))
    patch_children(monkeypatch, public_path / "site", IN_MOUNTS + code)
    with mounted(None, mountpoint, *options) as mount:
        reader = subprocess.Popen(
            [sys.executable, "-c", READ, mountpoint / "base.mem"], stderr=subprocess.PIPE
        )
        try:
            server = mount.pid
            until(partial(is_stuck, server), "the push did not come to that page")
            mount.kill()
            assert is_stuck(server) and reader.poll() is None
            subprocess.run(["umount", "-f", mountpoint], capture_output=True, check=False)
            assert b"OSError" in reader.communicate(timeout=20)[1]
            until(partial(has_no_thread, server), "a thread of it hangs")
        finally:
            reader.kill()
            abort(str(mountpoint))
            reader.communicate(timeout=60)


# Recording

RECORDING = {
    "opened": "after diffmergefs.prefetch.recorder:Recorder.opened",
    "closed": "before diffmergefs.prefetch.recorder:Recorder.closed",
    "write": "before diffmergefs.prefetch.recorder:Recorder._write",
    "written": "after diffmergefs.prefetch.recorder:Recorder._write",
}


@needs_resend
def test_a_recording_ends_with_its_server(
    public_path: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next restore is recorded as ever"""
    base, diff = write_pair(public_path)
    sets = public_path / "sets"
    moments = Moments(public_path / "moments", RECORDING)
    moments.patch(monkeypatch)
    view, takeovers = mountpoint / "base.mem", 0
    options = ["--base", str(base), "--diff", str(diff), "--record", f"--working-set-dir={sets}"]
    with mounted(None, mountpoint, *options, expect_log=(TOOK_OVER,)) as mount:

        def restore() -> None:
            with held(view) as holder:
                for page in TOUCHED:
                    start = page * PAGE
                    assert holder.read(start, PAGE) == ORACLE[start : start + PAGE]

        for _ in range(10):
            for name in RECORDING:
                moments.arm(name)
                restore()
                moments.wait(name)
                takeovers += 1
                wait_for_takeovers(mount, takeovers)
        with held(view) as holder:
            holder.read(0, PAGE)
            kill_and_wait(mount)
        before = mount.log().count("recorded the first touch")
        restore()
        until(lambda: mount.log().count("recorded the first touch") > before, "not recorded")


# Leases

# Right after the server took the lease, and before it gave it back.
LEASED = """
    import fcntl, os
    import diffmergefs.opening.writers as module
    from types import SimpleNamespace
    def asked(fd, command, argument=0):
        result = fcntl.fcntl(fd, command, argument)
        taken = command == fcntl.F_SETLEASE and argument == fcntl.F_RDLCK
        if taken and "bottom" in os.readlink(f"/proc/self/fd/{{fd}}"):
            {act}
        return result
    names = {{name: getattr(fcntl, name) for name in dir(fcntl)}}
    module.fcntl = SimpleNamespace(**(names | {{"fcntl": asked}}))
"""
DIES = """
            try:
                os.unlink({armed!r})
            except FileNotFoundError:
                pass
            else:
                os.kill(os.getpid(), 9)
"""
OPEN = "import os, sys; os.close(os.open(sys.argv[1], os.O_RDWR)); print('opened')"


@needs_resend
def test_a_lease_of_a_dead_server_keeps_no_writer_waiting(
    public_path: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch, seen: Callable[..., None]
) -> None:
    """The kernel would have it wait for 45 seconds"""
    store, times, longest = public_path / "store", 10, 0.0
    write_tag(store, "bottom")
    write_tag(store, "known", "bottom", layer=1, numbers=[1])
    for number in range(times):
        write_tag(store, f"fresh{number}", "bottom", layer=2, numbers=[number])
    armed, layer = public_path / "armed", store / "bottom" / "memory.bin"
    code = LEASED.format(act=DIES.format(armed=str(armed)).lstrip())
    patch_children(monkeypatch, public_path / "site", IN_MOUNTS + code)
    expected = (TOOK_OVER, "changed", "not shown")
    with mounted(store, mountpoint, expect_log=expected) as mount:
        with held(mountpoint / "known" / "memory.bin") as holder:
            first = holder.read(0, PAGE)  # the keeper has its layers
            for number in range(times):
                armed.touch()
                looker = subprocess.Popen(
                    ["cat", mountpoint / f"fresh{number}" / "memory.bin"], stdout=subprocess.PIPE
                )
                until(lambda: not armed.exists(), "no lease was asked for")
                began = time.monotonic()
                done = subprocess.run(
                    [sys.executable, "-c", OPEN, str(layer)],
                    capture_output=True,
                    text=True,
                    timeout=20,
                    check=False,
                )
                longest = max(longest, time.monotonic() - began)
                assert done.stdout == "opened\n", done
                looker.communicate(timeout=60)
                wait_for_takeovers(mount, number + 1)
                assert holder.read(PAGE, PAGE) == holder.read(PAGE, PAGE) != b""
            assert holder.read(0, PAGE) == first
        assert not is_leased(layer)
    # Starting a process counts too.
    assert longest < 10
    seen(kills=times, longest_wait_of_a_writer_ms=round(1000 * longest))
