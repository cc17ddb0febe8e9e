"""The status of a mount: its unlisted files, and the command that prints them."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest
import trio

from diffmergefs import __version__
from diffmergefs.core import STATUS_FOLDER
from diffmergefs.core.errors import BrokenChainError
from diffmergefs.fuse.nodes import ROOT_INODE
from diffmergefs.fuse.operations import Operations
from diffmergefs.fuse.served import Store
from diffmergefs.fuse.status import METRICS_FILE, Metrics, Status, rendered, status_of
from diffmergefs.fuse.tree import Tree
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.stores.catalog import LAYOUTS, read_catalog
from tests.support.cloudhypervisor import write_snapshot
from tests.support.commands import mistake
from tests.support.counters import NOTHING, metric_families
from tests.support.images import PAGE, write_layer
from tests.support.live import error_of, until
from tests.support.mounts import mounted
from tests.support.places import DOCS
from tests.support.stores import SIZE, age, pages, write_chain, write_numbered, write_tag
from tests.support.superserve import write_template

CTX: Any = SimpleNamespace(pid=1)
COMMAND = [sys.executable, "-m", "diffmergefs"]


def run(*arguments: str | Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def status_in(mountpoint: Path) -> Status:
    return Status.from_json((mountpoint / STATUS_FOLDER / "status.json").read_bytes())


def operations_on(store: Path) -> Operations:
    found = Store(str(store), TrustPolicy())
    found.look()
    return Operations(Tree("/somewhere", found))


async def walk(operations: Operations, *names: bytes) -> pyfuse3.EntryAttributes:
    inode = ROOT_INODE
    for name in names:
        entry = await operations.lookup(inode, name, CTX)
        inode = entry.st_ino
    return entry


async def status_by(operations: Operations) -> Status:
    entry = await walk(operations, b".diffmergefs", b"status.json")
    info = await operations.open(entry.st_ino, os.O_RDONLY, CTX)
    assert info.direct_io and not info.keep_cache
    found = Status.from_json(await operations.read(info.fh, 0, 1 << 20))
    await operations.release(info.fh)
    return found


def test_the_handlers_are_counted_by_tag_and_layer(tmp_path: Path) -> None:
    operations = operations_on(write_chain(tmp_path / "store", ["base", "leaf"]))

    async def main() -> None:
        before = await status_by(operations)
        assert (before.reads, before.open_images, before.open_files) == (0, 0, 0)
        entry = await walk(operations, b"leaf", b"memory.bin")
        info = await operations.open(entry.st_ino, os.O_RDONLY, CTX)
        for off, size in ((0, 3 * PAGE), (PAGE, PAGE), (SIZE - PAGE, 2 * PAGE)):
            await operations.read(info.fh, off, size)
        found = await status_by(operations)
        # The base has pages 0 to 14, the leaf page 1.
        supplied = {(each.tag, each.layer): each.bytes for each in found.supplied}
        assert supplied == {("leaf", 0): 2 * PAGE, ("leaf", 1): 2 * PAGE, ("leaf", None): PAGE}
        assert (found.reads, found.open_images, found.open_files) == (3, 1, 1)
        assert found.read_buckets[-1].reads == 3 and found.read_seconds > 0
        counts = {each.operation: each.requests for each in found.operations}
        # The status itself was looked up, opened and read twice.
        assert (counts["lookup"], counts["open"], counts["read"]) == (6, 3, 4)
        with pytest.raises(pyfuse3.FUSEError):
            await operations.lookup(ROOT_INODE, b"none", CTX)
        with pytest.raises(pyfuse3.FUSEError):
            await operations.read(77, 0, 1)
        failed = {e.operation: e.errors for e in (await status_by(operations)).operations}
        assert (failed["lookup"], failed["read"]) == ({"ENOENT": 1}, {"EIO": 1})
        await operations.release(info.fh)
        assert (await status_by(operations)).open_files == 0

    trio.run(main)


def test_a_read_from_a_worker_thread_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operations = operations_on(write_chain(tmp_path / "store", ["base"]))
    preadv = os.preadv

    def missing(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            raise BlockingIOError(errno.EAGAIN, "not in the page cache")
        return preadv(fd, buffers, offset, flags)

    async def main() -> None:
        entry = await walk(operations, b"base", b"memory.bin")
        info = await operations.open(entry.st_ino, os.O_RDONLY, CTX)
        await operations.read(info.fh, 0, PAGE)
        monkeypatch.setattr(os, "preadv", missing)
        await operations.read(info.fh, 0, PAGE)
        found = await status_by(operations)
        assert (found.reads, found.reads_in_threads) == (2, 1)
        assert [each.bytes for each in found.supplied] == [2 * PAGE]

    trio.run(main)


def test_tags_that_are_gone_are_counted_together(tmp_path: Path) -> None:
    store = write_chain(tmp_path / "store", ["base", "leaf"])
    operations = operations_on(store)

    async def main() -> None:
        entry = await walk(operations, b"leaf", b"memory.bin")
        info = await operations.open(entry.st_ino, os.O_RDONLY, CTX)
        await operations.read(info.fh, 0, PAGE)
        (store / "leaf").rename(tmp_path / "elsewhere")
        assert operations.tree.store is not None
        operations.tree.store.look()
        # An open image still counts by its tag: it may be read.
        assert [each.tag for each in (await status_by(operations)).supplied] == ["leaf"]
        await operations.release(info.fh)
        (gone,) = (await status_by(operations)).supplied
        assert (gone.tag, gone.layer, gone.bytes) == ("(gone)", 0, PAGE)

    trio.run(main)


def test_no_tag_of_a_store_can_have_the_name_of_the_status_folder(tmp_path: Path) -> None:
    store = write_chain(tmp_path / "store", ["base"])
    write_tag(store, STATUS_FOLDER)
    operations = operations_on(store)
    assert operations.tree.store is not None and operations.tree.store.tags() == ["base"]
    trio.run(status_by, operations)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_has_a_tag_with_the_name_of_the_status_folder(
    layout: str, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    if layout == "forkd":
        write_chain(store, ["base", STATUS_FOLDER])
    elif layout == "numbered":
        write_numbered(store, ["000-base.mem", f"001-{STATUS_FOLDER}.mem", "002-c.mem"])
    elif layout == "superserve":
        write_template(store, "base")
        write_template(store, STATUS_FOLDER)
    else:
        write_snapshot(store, "base")
        write_snapshot(store, STATUS_FOLDER, "base", layer=1)
    operations = operations_on(store)
    assert operations.tree.store is not None and operations.tree.store.tags() == ["base"]
    trio.run(status_by, operations)
    with pytest.raises(BrokenChainError, match=r"tag.*'\.diffmergefs'"):
        read_catalog(str(store)).chain(STATUS_FOLDER)


def test_no_explicit_image_can_have_the_name_of_the_status_folder(tmp_path: Path) -> None:
    base = write_layer(tmp_path / STATUS_FOLDER, SIZE, pages(0, [0]))
    (tmp_path / "mnt").mkdir()
    text = mistake(11, "mount", "-f", "--base", base, tmp_path / "mnt")
    assert f"{base}: '.diffmergefs' is the mount's own directory" in text


def test_only_the_owner_reads_the_status_and_no_listing_has_it(
    public_path: Path, mountpoint: Path
) -> None:
    store = write_chain(public_path / "store", ["base", "leaf"])
    with mounted(store, mountpoint, "--allow-other") as mount:
        folder = mountpoint / STATUS_FOLDER
        assert sorted(os.listdir(mountpoint)) == ["base", "leaf"]
        copy = public_path / "copy"
        subprocess.run(["cp", "-r", mountpoint, copy], check=True, timeout=60)
        assert sorted(os.listdir(copy)) == ["base", "leaf"]
        assert sorted(os.listdir(folder)) == ["metrics", "status.json"]
        modes = [(folder, stat.S_IFDIR | 0o500)]
        modes += [(folder / name, stat.S_IFREG | 0o400) for name in ("metrics", "status.json")]
        for path, mode in modes:
            found = path.stat()
            assert (found.st_mode, found.st_uid) == (mode, os.geteuid())
        with pytest.raises(OSError, match="Read-only"):
            (folder / "status.json").write_text("x")

        first, again = status_in(mountpoint), status_in(mountpoint)
        assert first.pid == mount.process.pid and first.version == __version__
        assert first.open_images == 2
        assert {each.tag for each in first.supplied} == {"base", "leaf"}
        assert again.reads == first.reads
        # One open file holds the numbers of one moment.
        with (folder / "status.json").open("rb", buffering=0) as file:
            head = file.read(40)
            os.stat(mountpoint / "leaf" / "vmstate")
            (mountpoint / "leaf" / "vmstate").read_bytes()
            assert Status.from_json(head + file.read()).pid == mount.process.pid

        text = (folder / "metrics").read_text()
        names = {family.name for family in metric_families(text)}
        assert "diffmergefs_supplied_bytes" in names
        for secret in (str(public_path), "store", "memory.bin"):
            assert secret not in text
            assert secret not in (folder / "status.json").read_text()
        done = subprocess.run(
            ["setpriv", "--reuid=1", "--regid=1", "--clear-groups", "cat", folder / "metrics"],
            capture_output=True,
            timeout=60,
        )
        assert done.returncode != 0 and b"Permission denied" in done.stderr


def test_an_explicit_mount_has_it_too_and_taints_are_counted(
    public_path: Path, mountpoint: Path
) -> None:
    base = write_layer(public_path / "mem_file", SIZE, pages(0, range(16)))
    age(base)
    with mounted(None, mountpoint, "--base", str(base), expect_log=("changed",)):
        assert os.listdir(mountpoint) == ["mem_file"]
        view = mountpoint / "mem_file"
        with view.open("rb") as file:
            os.pread(file.fileno(), 1, 0)
            before = status_in(mountpoint)
            assert (before.tainted_layers, before.open_images, before.open_files) == (0, 1, 1)
        os.utime(base)
        with view.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert error_of(view) == errno.EIO
        after = status_in(mountpoint)
        assert after.tainted_layers == 1
        assert {each.tag for each in after.supplied} == {"mem_file"}


def test_the_fast_loop_is_in_force_unless_it_is_switched_off(
    public_path: Path, mountpoint: Path
) -> None:
    store = write_chain(public_path / "store", ["base"])
    for options, is_fast, line in (
        ((), True, "the fast read loop is in force"),
        (("-o", "no_fast_loop"), False, "the fast read loop is switched off"),
    ):
        with mounted(store, mountpoint, *options) as mount:
            (mountpoint / "base" / "memory.bin").read_bytes()
            assert status_in(mountpoint).fast_loop is is_fast
            metrics = (mountpoint / STATUS_FOLDER / "metrics").read_text()
            assert f"diffmergefs_fast_loop {float(is_fast)}" in metrics
            assert line in mount.log()
            shown = run("status", mountpoint).stdout
            assert re.search(r"^read loop +fast$", shown, re.M) is not None or not is_fast


def test_the_command_prints_a_table_or_json(public_path: Path, mountpoint: Path) -> None:
    store = write_chain(public_path / "store", ["base", "leaf"])
    with mounted(store, mountpoint) as mount:
        (mountpoint / "leaf" / "memory.bin").read_bytes()
        done = run("status", mountpoint)
        assert (done.returncode, done.stderr) == (0, "")
        assert re.search(
            rf"^daemon +pid {mount.process.pid}, version {__version__}, up ", done.stdout, re.M
        )
        assert re.search(rf"^leaf +1 +{PAGE} \(4 KiB\)$", done.stdout, re.M)
        assert re.search(r"^open +1 image, 0 files$", done.stdout, re.M)
        done = run("status", "--json", mountpoint)
        assert Status.from_json(done.stdout).pid == mount.process.pid


def test_the_command_watches_until_it_is_interrupted(public_path: Path, mountpoint: Path) -> None:
    store = write_chain(public_path / "store", ["base"])
    with mounted(store, mountpoint):
        process = subprocess.Popen(
            [*COMMAND, "status", "--json", "--watch", "--interval", "0.1", mountpoint],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            seen, decoder = "", json.JSONDecoder()
            looks: list[dict[str, Any]] = []
            while len(looks) < 3:
                seen += process.stdout.readline()
                try:
                    found, end = decoder.raw_decode(seen)
                except ValueError:
                    continue
                looks.append(found)
                seen = seen[end:].lstrip()
            reads = [sum(o["requests"] for o in look["operations"]) for look in looks]
            assert reads == sorted(set(reads))  # each update has new numbers
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=20)
            assert (process.returncode, err) == (0, "")
        finally:
            process.kill()
            process.communicate()


def test_the_command_updates_a_terminal_in_place(public_path: Path, mountpoint: Path) -> None:
    store = write_chain(public_path / "store", ["base"])
    ours, theirs = os.openpty()
    with mounted(store, mountpoint) as mount:
        process = subprocess.Popen(
            [*COMMAND, "status", "--watch", "--interval", "0.1", mountpoint],
            stdout=theirs,
            stderr=theirs,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
        )
        os.close(theirs)
        try:
            seen = b""
            # Twice, because it was drawn again.
            while seen.count(f"pid {mount.process.pid}".encode()) < 2:
                seen += os.read(ours, 65536)
            process.send_signal(signal.SIGINT)
            assert until(lambda: process.poll() is not None, "it did not end")
            assert process.returncode == 0
        finally:
            process.kill()
            process.wait()
            os.close(ours)


def test_the_command_distinguishes_no_mount_and_a_stale_one(
    public_path: Path, mountpoint: Path
) -> None:
    done = run("status", mountpoint)
    assert done.returncode == 10 and "not a diffmergefs mount point" in done.stderr
    store = write_chain(public_path / "store", ["base"])
    with mounted(store, mountpoint) as mount:
        mount.kill()
        done = run("status", mountpoint)
        assert done.returncode == 11 and "its daemon died" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def listed(*options: str) -> tuple[int, dict[str, dict[str, Any]], str]:
    """The exit code of `status`, its rows of mounts by mountpoint, and its messages."""
    done = run("status", "--json", *options)
    rows = [row for row in json.loads(done.stdout) if "mountpoint" in row]
    return done.returncode, {row["mountpoint"]: row for row in rows}, done.stderr


def test_without_a_mountpoint_all_mounts_are_listed(public_path: Path, mountpoint: Path) -> None:
    store = write_chain(public_path / "store", ["base"])
    second = public_path / "zweiter Mount, ü"
    second.mkdir()
    with mounted(store, mountpoint) as mount, mounted(store, second) as other:
        rows = listed()[1]
        for path, process in ((mountpoint, mount), (second, other)):
            row = rows[str(path)]
            assert (row["source"], row["user"], row["state"]) == (str(store), 0, "serving")
            assert (row["problem"], row["status"]["pid"]) == (None, process.process.pid)
        assert set(row) == {"mountpoint", "source", "user", "state", "problem", "status"}
        with (mountpoint / "base" / "memory.bin").open("rb"):
            text = run("status").stdout
        pattern = rf"^{mountpoint} +{store} +0 +serving +{mount.process.pid} +0:00:\d\d +1$"
        assert re.search(pattern, text, re.MULTILINE)
        assert f"\n{second} " in text
        # What lies under another mount, and a bind mount of a part, are no mounts of their own.
        bound = public_path / "bound"
        bound.touch()
        part = ["--bind", f"{second}/base/memory.bin", str(bound)]
        for how in (part, ["-t", "tmpfs", "tmpfs", str(second)]):
            subprocess.run(["mount", *how], check=True, timeout=60)
        assert listed()[1].keys() & {str(second), str(bound)} == set()
        for path in (second, bound):
            subprocess.run(["umount", path], check=True, timeout=60)


def test_a_mount_that_does_not_serve_is_listed_with_its_next_step(
    public_path: Path, mountpoint: Path
) -> None:
    store = write_chain(public_path / "store", ["base"])
    paths = [mountpoint, *(public_path / name for name in ("stale", "hung", "foreign"))]
    for path in paths[1:]:
        path.mkdir()
    with (
        mounted(store, paths[0]),
        mounted(store, paths[1]) as stale,
        mounted(store, paths[2]) as hung,
    ):
        stale.kill()
        with hung.stopped():
            code, rows, messages = listed()
        states = [rows[str(path)]["state"] for path in paths[:3]]
        assert (code, states) == (1, ["serving", "stale", "hung"])
        assert (
            f"{paths[1]}: stale mount: its daemon died; unmount it or mount it again\n" in messages
        )
        assert f"detach it with `diffmergefs umount --lazy {paths[2]}`\n" in messages
        assert all(rows[str(path)]["status"] is None for path in paths[1:3])


def test_the_manual_lists_the_metrics_and_the_fields() -> None:
    metrics = Metrics()
    known = status_of(metrics, **NOTHING)
    text = (DOCS / "diffmergefs-status.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(diffmergefs_\w+)` \| (\w+) \|", text, re.MULTILINE)
    families = metric_families(rendered(METRICS_FILE, known).decode())
    assert sorted(listed) == sorted((family.name, family.type) for family in families)
    fields = text.split("## STATUS.JSON")[1].split("##")[0]
    named = re.findall(r"^- `(\w+)`", fields, re.MULTILINE)
    assert named == [field.name for field in dataclasses.fields(Status)]
