"""--record and --prefetch on real mounts: what is recorded, what is resident, and every ending."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from diffmergefs.prefetch.push import pieces
from diffmergefs.prefetch.record import WorkingSet, WorkingSets, identity_of_files
from diffmergefs.system.tuning import CONNECTIONS
from tests.support import mounttable
from tests.support.commands import diffmergefs, mistake
from tests.support.images import PAGE
from tests.support.live import Gate, error_of, patch_children, until
from tests.support.mounts import Mount, mounted, require_fusectl
from tests.support.pagecache import evict, resident
from tests.support.processes import children_of
from tests.support.restores import ORACLE, PAGES, SIZE, ranges_of, save, scattered, shown
from tests.support.restores import write_pair as write_files
from tests.support.stores import write_tag

TOUCHED = scattered(100)
WANTED = pieces(ranges_of(TOUCHED), SIZE)

# A guest, as the mount sees one: a private mapping, touched here and there.
GUEST = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR if sys.argv[2] == 'w' else os.O_RDONLY)
view = mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
os.close(fd)
for page in map(int, sys.argv[3:]):
    view[page * 4096]
"""

# In the daemon: each piece that was pushed takes a while, or waits at a gate.
SLOW = """
import time
import diffmergefs.prefetch.push as module
real = module.Notify.__init__
def init(self, store, *rest):
    def slow(inode, offset, data):
        store(inode, offset, data)
        {wait}
    real(self, slow)
module.Notify.__init__ = init
"""


class Pair:
    """A base and a diff in a folder, and the records of their chain."""

    def __init__(self, folder: Path) -> None:
        self.files = write_files(folder)
        self.sets = WorkingSets(str(folder / "sets"))
        self.options = ["--base", str(self.files[0]), "--diff", str(self.files[1])]
        self.options += ["--working-set-dir", self.sets.directory]

    def record(self) -> WorkingSet | None:
        return self.sets.load(identity_of_files(map(str, self.files)))

    def save(self) -> None:
        save(self.sets, shown(*self.files), TOUCHED)


@pytest.fixture
def pair(public_path: Path) -> Pair:
    require_fusectl()  # the guard of a push takes it
    return Pair(public_path)


@pytest.fixture
def view(mountpoint: Path) -> Path:
    return mountpoint / "base.mem"


def run_guest(view: Path, pages: list[int], mode: str = "r") -> None:
    command = [sys.executable, "-c", GUEST, str(view), mode, *map(str, pages)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@contextmanager
def opened(view: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(view, flags)
    try:
        yield fd
    finally:
        # Of a daemon that has ended already.
        with suppress(OSError):
            os.close(fd)


def has_said(mount: Mount, text: str, times: int = 1) -> None:
    until(lambda: mount.log().count(text) >= times, f"the log does not say '{text}'")


def touched_pages() -> set[int]:
    return set(TOUCHED)


# Recording


@pytest.mark.parametrize("mode", ["r", "w"])
def test_a_restore_is_recorded_touch_by_touch(
    mode: str, pair: Pair, view: Path, mountpoint: Path
) -> None:
    more = ["--open-rw"] if mode == "w" else []
    with mounted(None, mountpoint, "--record", *pair.options, *more) as mount:
        run_guest(view, TOUCHED, mode)
        has_said(mount, "recorded the first touch of")
        found = pair.record()
        assert found is not None and list(found.ranges) == ranges_of(TOUCHED)
        assert found.readahead_kib == 4
        # The next one starts from what the kernel has none of.
        run_guest(view, TOUCHED[::-1], mode)
        has_said(mount, "recorded the first touch of", times=2)
        found = pair.record()
        assert found is not None and list(found.ranges) == ranges_of(TOUCHED[::-1])
        assert view.read_bytes() == ORACLE


@pytest.mark.parametrize(
    ("readahead", "command"),
    [("4", "cp {view} {copy}"), ("128", "sha256sum {view}"), ("1024", "cp -a {view} {copy}")],
)
def test_who_reads_all_in_order_leaves_no_record(
    readahead: str,
    command: str,
    pair: Pair,
    view: Path,
    public_path: Path,
    mountpoint: Path,
) -> None:
    argv = command.format(view=view, copy=public_path / "copy").split()
    options = ["--record", "--readahead", readahead, *pair.options]
    with mounted(None, mountpoint, *options, expect_log=("the kernel reads ahead",)) as mount:
        subprocess.run(argv, check=True, capture_output=True, timeout=60)
        has_said(mount, "not recorded: it was read in order")
        assert pair.record() is None
    assert not list(Path(pair.sets.directory).iterdir())


def test_a_restore_that_outlives_the_daemon_is_recorded(
    pair: Pair, view: Path, mountpoint: Path
) -> None:
    with mounted(None, mountpoint, "--record", *pair.options) as mount, opened(view) as fd:
        for page in TOUCHED:
            os.pread(fd, PAGE, page * PAGE)
        mount.process.send_signal(signal.SIGTERM)
        has_said(mount, "detached")
        mount.process.send_signal(signal.SIGTERM)
        assert mount.process.wait(20) == 0
    found = pair.record()
    assert found is not None and list(found.ranges) == ranges_of(TOUCHED)


def test_a_guest_right_before_the_unmount_is_recorded(
    pair: Pair, view: Path, mountpoint: Path
) -> None:
    with mounted(None, mountpoint, "--record", *pair.options) as mount:
        run_guest(view, TOUCHED)
        mounttable.unmount(str(mountpoint))
        assert mount.process.wait(20) == 0
    found = pair.record()
    assert found is not None and list(found.ranges) == ranges_of(TOUCHED)


def test_each_tag_of_a_store_has_a_record_of_its_own(public_path: Path, mountpoint: Path) -> None:
    store, sets = public_path / "store", WorkingSets(str(public_path / "sets"))
    write_tag(store, "base", numbers=range(PAGES), size=SIZE)
    write_tag(store, "leaf", "base", layer=1, numbers=range(0, PAGES, 3), size=SIZE)
    with mounted(store, mountpoint, "--record", f"--working-set-dir={sets.directory}") as mount:
        run_guest(mountpoint / "leaf" / "memory.bin", TOUCHED)
        run_guest(mountpoint / "base" / "memory.bin", TOUCHED[:50])
        has_said(mount, "recorded the first touch of", times=2)
    files = [str(store / tag / "memory.bin") for tag in ("base", "leaf")]
    for chain, count in ((files, 100), (files[:1], 50)):
        found = sets.load(identity_of_files(chain))
        assert found is not None and list(found.ranges) == ranges_of(TOUCHED[:count])
    base = mountpoint / "base" / "memory.bin"
    prefetching = mounted(store, mountpoint, f"--working-set-dir={sets.directory}")
    with prefetching as mount, opened(base) as fd:
        has_said(mount, "prefetched")
        assert resident(fd) == set(TOUCHED[:50])


def test_a_record_that_could_not_be_kept_is_no_mount(pair: Pair, mountpoint: Path) -> None:
    Path(pair.sets.directory).mkdir(mode=0o777)
    os.chmod(pair.sets.directory, 0o777)
    line = mistake(14, "mount", "-f", "--record", *pair.options, mountpoint)
    assert f"{pair.sets.directory}: others may write to it" in line
    assert not mounttable.at(str(mountpoint))


@pytest.mark.parametrize("how", ["--prefetch", "--prefetch=fadvise"])
def test_record_and_prefetch_exclude_each_other(how: str, pair: Pair, mountpoint: Path) -> None:
    done = diffmergefs("mount", "--record", how, *pair.options, mountpoint)
    assert done.returncode == 2 and "cannot be combined" in done.stderr


def test_record_goes_with_no_prefetch(pair: Pair, mountpoint: Path) -> None:
    with mounted(None, mountpoint, "--record", "--prefetch=no", *pair.options):
        assert os.path.isdir(pair.sets.directory)


# Prefetch


@pytest.mark.parametrize(
    "options",
    [(), ("--prefetch",), ("--prefetch=notify",), ("-o", "prefetch"), ("--prefetch=fadvise",)],
    ids=str,
)
def test_what_was_recorded_is_resident_and_right(
    options: tuple[str, ...], pair: Pair, view: Path, mountpoint: Path
) -> None:
    pair.save()
    with mounted(None, mountpoint, *pair.options, *options) as mount, opened(view) as fd:
        has_said(mount, f"prefetched {len(TOUCHED) * PAGE} bytes in {len(WANTED)} pieces")
        until(lambda: resident(fd) >= touched_pages(), "not all of it is resident")
        assert resident(fd) == touched_pages()
        # Cached pages are not asked for again: what comes here is what was pushed.
        assert os.pread(fd, SIZE, 0) == ORACLE
        with opened(view) as other:
            assert os.pread(other, SIZE, 0) == ORACLE
        evict(fd)
        assert os.pread(fd, SIZE, 0) == ORACLE


def test_the_status_tells_what_was_brought_and_that_nobody_asked_for_it(
    pair: Pair, view: Path, mountpoint: Path
) -> None:
    pair.save()
    status = mountpoint / ".diffmergefs" / "status.json"
    with mounted(None, mountpoint, *pair.options) as mount:
        with opened(view):
            has_said(mount, f"prefetched {len(TOUCHED) * PAGE} bytes")
            known = json.loads(status.read_bytes())
            assert known["prefetch_pushed_bytes"] == len(TOUCHED) * PAGE
            assert known["prefetch_hit_bytes"] == 0
        until(
            lambda: json.loads(status.read_bytes())["prefetch_hit_bytes"] == len(TOUCHED) * PAGE,
            "they are not counted at the last close",
        )


def test_no_means_no(pair: Pair, view: Path, mountpoint: Path) -> None:
    pair.save()
    with mounted(None, mountpoint, "--prefetch=no", *pair.options), opened(view) as fd:
        assert os.pread(fd, PAGE, TOUCHED[0] * PAGE)
        time.sleep(0.3)
        assert not resident(fd) >= touched_pages()


def test_a_stale_record_is_ignored(pair: Pair, view: Path, mountpoint: Path) -> None:
    pair.save()
    os.utime(pair.files[1], ns=(1, 1))
    expected = ("stale, and ignored",)
    with (
        mounted(None, mountpoint, *pair.options, expect_log=expected) as mount,
        opened(view) as fd,
    ):
        has_said(mount, f"stale, and ignored: {pair.files[1]}: another file, or written to since")
        assert not resident(fd)


def test_a_mapping_of_a_file_for_writing_is_prefetched_after_its_pages_were_dropped(
    pair: Pair, view: Path, mountpoint: Path
) -> None:
    pair.save()
    with (
        mounted(None, mountpoint, "--open-rw", *pair.options) as mount,
        opened(view, os.O_RDWR) as fd,
        mmap.mmap(fd, SIZE, mmap.MAP_PRIVATE) as memory,
    ):
        # Asked of another file: each mapping of this one drops them.
        assert not resident(view)
        first = TOUCHED[0] * PAGE
        assert memory[first : first + PAGE] == ORACLE[first : first + PAGE]
        has_said(mount, "prefetched")
        assert resident(view) >= touched_pages()
        assert memory[:] == ORACLE


def test_pages_that_were_dropped_are_pushed_again_for_a_later_open(
    pair: Pair, view: Path, mountpoint: Path
) -> None:
    pair.save()
    with mounted(None, mountpoint, *pair.options) as mount:
        with opened(view) as fd:
            has_said(mount, "prefetched")
            with opened(view) as other:
                assert os.pread(other, PAGE, TOUCHED[0] * PAGE)
            evict(fd)
            assert not resident(fd)
        with opened(view) as fd:
            assert os.pread(fd, PAGE, TOUCHED[0] * PAGE)
            has_said(mount, "prefetched", times=2)
            assert resident(fd) >= touched_pages()
        assert mount.log().count("prefetched") == 2


def test_the_child_of_fadvise_is_no_client(pair: Pair, view: Path, mountpoint: Path) -> None:
    """It neither keeps the image open nor is pushed for, and nothing of it is left."""
    pair.save()
    with mounted(None, mountpoint, "--prefetch=fadvise", *pair.options) as mount:
        for n in range(1, 4):
            with opened(view) as fd:
                if n > 1:
                    evict(fd)
                    os.pread(fd, PAGE, TOUCHED[0] * PAGE)
                has_said(mount, "prefetched", times=n)
            assert not children_of(mount.pid)
        assert mount.log().count("prefetched") == 3


def test_fadvise_brings_nothing_of_a_mount_that_is_detached(
    pair: Pair, view: Path, mountpoint: Path
) -> None:
    pair.save()
    with mounted(None, mountpoint, "--prefetch=fadvise", "--open-rw", *pair.options) as mount:
        with opened(view, os.O_RDWR) as fd:
            mount.process.send_signal(signal.SIGTERM)
            until(lambda: not mounttable.at(str(mountpoint)), "it was not detached")
            # Another file stands at its path by now.
            view.write_bytes(ORACLE)
            try:
                assert os.pread(fd, PAGE, TOUCHED[0] * PAGE)
                has_said(
                    mount, f"prefetch ends: {view}: is no longer there (the child's exit status: 3)"
                )
            finally:
                view.unlink()
        assert mount.process.wait(20) == 0


# Every ending, in the middle of a push


@pytest.fixture
def slow(pair: Pair, public_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.save()
    patch_children(monkeypatch, public_path / "patch", SLOW.format(wait="time.sleep(0.1)"))


def is_pushing(fd: int) -> None:
    until(lambda: resident(fd), "nothing was pushed")


def was_cut_off(mount: Mount) -> None:
    assert len(WANTED) > 60 and "prefetched" not in mount.log()


@pytest.mark.usefixtures("slow")
def test_sigterm_and_then_the_last_close(pair: Pair, view: Path, mountpoint: Path) -> None:
    with mounted(None, mountpoint, *pair.options) as mount:
        with opened(view) as fd:
            is_pushing(fd)
            mount.process.send_signal(signal.SIGTERM)
            has_said(mount, "SIGTERM: detached; 1 file is open")
            assert os.pread(fd, SIZE, 0) == ORACLE
            assert mount.process.poll() is None
        assert mount.process.wait(20) == 0
        was_cut_off(mount)


@pytest.mark.usefixtures("slow")
def test_a_second_sigterm(pair: Pair, view: Path, mountpoint: Path) -> None:
    with mounted(None, mountpoint, *pair.options) as mount, opened(view) as fd:
        is_pushing(fd)
        mount.process.send_signal(signal.SIGTERM)
        has_said(mount, "SIGTERM: detached")
        mount.process.send_signal(signal.SIGTERM)
        assert mount.process.wait(20) == 0
        was_cut_off(mount)


@pytest.mark.usefixtures("slow")
def test_the_last_close_and_then_an_unmount(pair: Pair, view: Path, mountpoint: Path) -> None:
    with mounted(None, mountpoint, *pair.options) as mount:
        with opened(view) as fd:
            is_pushing(fd)
            assert "files of it are open" in mistake(15, "umount", mountpoint)
        mounttable.unmount(str(mountpoint))
        assert mount.process.wait(20) == 0
        was_cut_off(mount)


@pytest.mark.usefixtures("slow")
def test_a_lazy_unmount_and_then_the_last_close(pair: Pair, view: Path, mountpoint: Path) -> None:
    with mounted(None, mountpoint, *pair.options) as mount:
        with opened(view) as fd:
            is_pushing(fd)
            subprocess.run(["umount", "--lazy", mountpoint], check=True, timeout=20)
            assert os.pread(fd, SIZE, 0) == ORACLE
        assert mount.process.wait(20) == 0
        was_cut_off(mount)


@pytest.mark.usefixtures("slow")
def test_the_last_close_alone(pair: Pair, view: Path, mountpoint: Path) -> None:
    """The mount goes on, and the next open has a push of its own."""
    with mounted(None, mountpoint, *pair.options) as mount:
        with opened(view) as fd:
            is_pushing(fd)
        with opened(view) as fd:
            evict(fd)
            os.pread(fd, PAGE, TOUCHED[0] * PAGE)
            until(lambda: len(resident(fd)) > 3, "it was not pushed again")
        was_cut_off(mount)
        assert view.read_bytes() == ORACLE


@pytest.mark.usefixtures("slow")
def test_a_taint(pair: Pair, view: Path, mountpoint: Path) -> None:
    expected = ("the layer changed under its views", "the layer changed while in use")
    with mounted(None, mountpoint, *pair.options, expect_log=expected) as mount:
        with opened(view) as fd:
            is_pushing(fd)
            os.utime(pair.files[0])
            has_said(mount, "prefetch ends: ")
            count = len(resident(fd))
            assert error_of(view) == 5
            assert len(resident(fd)) >= count
        was_cut_off(mount)


@pytest.mark.usefixtures("slow")
def test_sigkill(pair: Pair, view: Path, mountpoint: Path) -> None:
    with mounted(None, mountpoint, *pair.options) as mount:
        with opened(view) as fd:
            is_pushing(fd)
            mount.kill()
            pages = resident(fd)
            first = min(pages) * PAGE
            assert os.pread(fd, PAGE, first) == ORACLE[first : first + PAGE]
        mounttable.unmount(str(mountpoint))


def test_a_push_that_hangs_does_not_keep_a_second_signal_waiting(
    pair: Pair, view: Path, mountpoint: Path, public_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(public_path / "gate")
    pair.save()
    gate.patch(monkeypatch, SLOW.format(wait="wait_at_gate()"))
    try:
        with mounted(None, mountpoint, *pair.options) as mount, opened(view):
            gate.wait_until_reached()
            mount.process.send_signal(signal.SIGTERM)
            has_said(mount, "SIGTERM: detached")
            mount.process.send_signal(signal.SIGTERM)
            assert mount.process.wait(20) == 0
    finally:
        gate.open()


# A client's reads hang in a layer's storage; those of the push do not, and so it comes to the very
# page that the client waits for, and waits in the kernel, where no signal reaches it.
HUNG_READS = """
import threading
from diffmergefs.core.view import MergedView
fill = MergedView.fill
def hung(self, *args):
    if threading.current_thread().name != "prefetch":
        wait_at_gate()
    return fill(self, *args)
MergedView.fill_nowait = lambda *args: 0
MergedView.fill = hung
"""


def test_a_push_that_waits_for_a_page_of_a_hung_read_ends_with_the_daemon(
    pair: Pair,
    view: Path,
    mountpoint: Path,
    public_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate(public_path / "gate")
    pair.save()
    last = WANTED[-1].start
    gate.patch(monkeypatch, HUNG_READS + SLOW.format(wait="time.sleep(0.02)"))
    code = f"import os; os.write(1, os.pread(os.open({str(view)!r}, os.O_RDONLY), {PAGE}, {last}))"
    try:
        with mounted(None, mountpoint, *pair.options) as mount:
            # Held open: the number may be another mount's once this one is gone.
            knob = os.open(f"{CONNECTIONS}/{os.stat(mountpoint).st_dev}/abort", os.O_WRONLY)
            reader = subprocess.Popen(
                [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            try:
                gate.wait_until_reached()
                until(lambda: is_stuck(mount.pid), "the push did not come to that page")
                mount.process.send_signal(signal.SIGTERM)
                has_said(mount, "SIGTERM: detached")
                mount.process.send_signal(signal.SIGTERM)
                assert mount.process.wait(20) == 0
                found, text = reader.communicate(timeout=20)
                # The push that is let go may still bring the page, and before the reader looks.
                assert found == ORACLE[last : last + PAGE] or (not found and b"OSError" in text)
            finally:
                # Whatever went wrong: nobody is left waiting in the kernel.
                os.write(knob, b"1")
                os.close(knob)
                reader.kill()
                reader.communicate()
            mounttable.unmount_below(str(mountpoint))
    finally:
        gate.open()


def is_stuck(pid: int) -> bool:
    """Whether a thread waits in the kernel for what no signal ends."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        state = (task / "stat").read_text().rpartition(")")[2].split()[0]
        if state == "D":
            time.sleep(0.2)
            again = (task / "stat").read_text().rpartition(")")[2].split()[0]
            if again == "D":
                return True
    return False
