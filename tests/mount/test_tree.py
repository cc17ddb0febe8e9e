"""The names in a mount, with their types, sizes and inode numbers."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.writing.sealing import seal_layer
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.inputs import unchanged
from tests.support.live import error_of, until_equal
from tests.support.mounts import Mount, mounted

SIZE = 64 * PAGE
BASE = [(0, signed(0, 0, SIZE))]
DIFF = [(8 * PAGE, signed(1, 8 * PAGE, 4 * PAGE))]
MEMORY = overlay_oracle(SIZE, [BASE, DIFF])

HARD_NAMES = [
    "naïve 名前".encode(),
    b"\xff\xfe not utf-8 \x80",
    b" leading and trailing ",
    b"new\nline\ttab",
    b'quo"te\\back%20',
    b"-rf",
    b"x" * 255,
    b".hidden",
    b"other.bmap",
]
EXPECT_REFUSED = ("its memory file is not shown", "not shown: ")


def write_tag(store: Path, tag: str, extents: Any, **document: Any) -> Path:
    folder = store / tag
    folder.mkdir(parents=True)
    (folder / "snapshot.json").write_text(json.dumps({"memory": "memory.bin"} | document))
    return write_layer(folder / "memory.bin", SIZE, extents)


def check_consistent(folder: Path) -> dict[str, os.stat_result]:
    """Require that readdir, lookup and stat agree on a directory's entries, and return them."""
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            status = os.stat(entry.path, follow_symlinks=False)
            assert entry.inode() == status.st_ino, entry.path
            assert entry.is_symlink() == stat.S_ISLNK(status.st_mode), entry.path
            assert entry.is_file(follow_symlinks=False) == stat.S_ISREG(status.st_mode)
            assert entry.is_dir(follow_symlinks=False) == stat.S_ISDIR(status.st_mode)
            assert entry.name not in found
            found[entry.name] = status
    inodes = [status.st_ino for status in found.values()]
    assert len(set(inodes)) == len(inodes)
    return found


def check_document(mount: Mount, tag: str, expected: Mapping[str, object]) -> None:
    path = mount.path / tag / "snapshot.json"
    content = path.read_bytes()
    assert path.stat().st_size == len(content)
    assert json.loads(content) == expected


def test_forkd_store(public_path: Path, mountpoint: Path) -> None:
    store = public_path / "store"
    # A base without a snapshot.json.
    (store / "plain").mkdir(parents=True)
    files = [write_layer(store / "plain" / "memory.bin", SIZE, BASE)]
    (store / "plain" / "vmstate").write_bytes(b"plain state")
    # Paths of another machine, the parent's hash, and keys that are passed on.
    extra = {"volumes": [{"id": 1}, None], "rootfs": "/img/root ü"}
    stale = {"memory": "/gone/child/memory.bin", "vmstate": "/gone/child/vm.state"}
    pin = hashlib.sha256(files[0].read_bytes()).hexdigest()
    parent = {"parent_tag": "plain", "parent_content_hash": pin}
    files.append(write_tag(store, "child", DIFF, **stale, **parent, **extra, note="not known"))
    (store / "child" / "vm.state").write_bytes(b"child state")
    # Files in the store, but not in the tag's own directory.
    (store / "pool").mkdir()
    files.append(write_layer(store / "pool" / "far.mem", SIZE, DIFF))
    (store / "pool" / "far.state").write_bytes(b"far state")
    (store / "far").mkdir()
    document = {"memory": f"{store}//pool/far.mem", "vmstate": f"{store}/pool/far.state"}
    (store / "far" / "snapshot.json").write_text(json.dumps(document | {"parent_tag": "plain"}))
    # A relative path to a subdirectory of the tag.
    (store / "deep" / "sub").mkdir(parents=True)
    files.append(write_layer(store / "deep" / "sub" / "deep.mem", SIZE, DIFF))
    (store / "deep" / "sub" / "beside").write_bytes(b"beside")
    document = {"memory": "sub/deep.mem", "parent_tag": "child"}
    (store / "deep" / "snapshot.json").write_text(json.dumps(document))
    # What the mount does not show at all.
    (store / ".compact-staging-1").mkdir()
    (store / ".compact-staging-1" / "snapshot.json").write_text('{"memory": "memory.bin"}')
    (store / "no-snapshot").mkdir()
    (store / "file").write_bytes(b"beside the tags")
    (store / "linked").symlink_to("child")
    for tag, document in (
        ("orphan", {"memory": "memory.bin", "parent_tag": "nobody"}),
        ("grandchild", {"memory": "memory.bin", "parent_tag": "orphan"}),
        ("loop", {"memory": "memory.bin", "parent_tag": "loop"}),
        ("pathless", {}),
    ):
        write_tag(store, tag, DIFF)
        (store / tag / "snapshot.json").write_text(json.dumps(document))
    write_tag(store, "illegal tag", BASE)
    write_tag(store, "garbled", BASE)
    (store / "garbled" / "snapshot.json").write_bytes(b"{")
    write_tag(store, "symlinked", BASE, memory="link.bin")
    (store / "symlinked" / "link.bin").symlink_to("memory.bin")

    with unchanged(files), mounted(store, mountpoint, expect_log=("not shown: ",)) as mount:
        root = check_consistent(mountpoint)
        assert sorted(root) == ["child", "deep", "far", "plain"]
        assert all(stat.S_ISDIR(status.st_mode) for status in root.values())
        for tag in ("orphan", "no-snapshot", ".compact-staging-1", "linked", "file", ".."[:1] * 3):
            assert error_of(mountpoint / tag) == errno.ENOENT, tag

        assert sorted(check_consistent(mountpoint / "plain")) == ["memory.bin", "vmstate"]
        assert (mountpoint / "plain" / "memory.bin").read_bytes() == BASE[0][1]
        names = ["memory.bin", "snapshot.json", "vm.state"]
        assert sorted(check_consistent(mountpoint / "child")) == names
        assert (mountpoint / "child" / "memory.bin").read_bytes() == MEMORY
        assert (mountpoint / "child" / "vm.state").read_bytes() == b"child state"
        paths: dict[str, object] = {
            "memory": f"{mountpoint}/child/memory.bin",
            "vmstate": f"{mountpoint}/child/vm.state",
        }
        check_document(mount, "child", paths | extra)

        names = ["far.mem", "far.state", "snapshot.json"]
        assert sorted(check_consistent(mountpoint / "far")) == names
        assert (mountpoint / "far" / "far.mem").read_bytes() == MEMORY
        assert (mountpoint / "far" / "far.state").read_bytes() == b"far state"
        paths = {
            "memory": f"{mountpoint}/far/far.mem",
            "vmstate": f"{mountpoint}/far/far.state",
        }
        check_document(mount, "far", paths)

        names = ["deep.mem", "snapshot.json", "sub"]
        assert sorted(check_consistent(mountpoint / "deep")) == names
        assert (mountpoint / "deep" / "deep.mem").read_bytes() == MEMORY
        # The layer itself is passed through nowhere.
        assert sorted(check_consistent(mountpoint / "deep" / "sub")) == ["beside"]
        assert error_of(mountpoint / "deep" / "sub" / "deep.mem") == errno.ENOENT
        for tag in ("illegal tag", "orphan", "grandchild", "loop", "pathless", "garbled"):
            assert f"{tag}: not shown: " in mount.log()


def test_other_files_of_a_tag(public_path: Path, mountpoint: Path) -> None:
    store = public_path / "store"
    layer = write_tag(store, "base", BASE)
    folder = store / "base"
    for n, name in enumerate(HARD_NAMES):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(b"content %d" % n)
    seal_layer(folder / "memory.bin", policy=TrustPolicy(dense=True))
    (folder / ".compact-staging-x").write_bytes(b"staging")
    (folder / "half.tmp").write_bytes(b"staging")
    os.mkfifo(folder / "fifo")
    os.mknod(folder / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    os.mknod(folder / "block", 0o600 | stat.S_IFBLK, os.makedev(7, 0))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(folder / "socket"))
    links = {
        "inside": "vmstate",
        "dangling": "no/such/file",
        "outside": "/etc/hostname",
        "upwards": "../../secret",
        "to-layer": "memory.bin",
        "to-loop": "to-loop",
    }
    for link, target in links.items():
        (folder / link).symlink_to(target)
    (folder / "vmstate").write_bytes(b"state")
    deep = folder / "a" / "b" / "c"
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(b"deep")
    (deep / "sparse").write_bytes(b"")
    os.truncate(deep / "sparse", 1 << 20)
    os.mkfifo(deep / "fifo")
    (folder / "vmstate").chmod(0o4750)
    os.chown(folder / "vmstate", 12, 34)
    os.utime(folder / "vmstate", ns=(5, 1_500_000_000_123_456_789))

    with unchanged([layer]), mounted(store, mountpoint):
        tag = mountpoint / "base"
        names = {os.fsdecode(name) for name in HARD_NAMES} | set(links)
        names |= {"memory.bin", "snapshot.json", "vmstate", "a"}
        assert set(check_consistent(tag)) == names
        for n, name in enumerate(HARD_NAMES):
            assert (tag / os.fsdecode(name)).read_bytes() == b"content %d" % n
        for link, target in links.items():
            assert os.readlink(tag / link) == target
            assert os.lstat(tag / link).st_size == len(target)
        # Only the client may follow it, never the daemon.
        assert (tag / "inside").read_bytes() == b"state"
        assert (tag / "to-layer").read_bytes() == BASE[0][1]
        assert error_of(tag / "to-loop") == errno.ELOOP
        for left_out in ("fifo", "null", "block", "socket", "memory.bin.bmap", "half.tmp", "none"):
            assert error_of(tag / left_out) == errno.ENOENT, left_out
        assert set(check_consistent(tag / "a" / "b" / "c")) == {"file", "sparse"}
        assert (tag / "a/b/c/file").read_bytes() == b"deep"
        assert (tag / "a/b/c/sparse").stat().st_blocks == 0
        assert (tag / "a/b/c/sparse").read_bytes() == bytes(1 << 20)
        mine, theirs = (tag / "vmstate").stat(), (folder / "vmstate").stat()
        for field in ("st_uid", "st_gid", "st_size", "st_mtime_ns", "st_blocks"):
            assert getattr(mine, field) == getattr(theirs, field), field
        assert stat.S_IMODE(mine.st_mode) == 0o750
        # An open file is held by its descriptor.
        with (tag / "vmstate").open("rb") as file:
            (folder / "vmstate").unlink()
            assert file.read() == b"state"
        until_equal(lambda: error_of(tag / "vmstate"), errno.ENOENT)
        statistics = os.statvfs(tag / "memory.bin")
        assert statistics.f_blocks * statistics.f_frsize == SIZE
        assert statistics.f_bavail == 0 and statistics.f_namemax == 255


def test_large_directories(public_path: Path, mountpoint: Path) -> None:
    store = public_path / "store"
    write_tag(store, "tag-000", BASE)
    passed = {f"file {n} {'long' * (n % 40)}" for n in range(3000)}
    for name in passed:
        (store / "tag-000" / name).touch()
    for n in range(1, 300):
        write_tag(store, f"tag-{n:03}", DIFF[:0], parent_tag="tag-000")
    with mounted(store, mountpoint):
        assert len(check_consistent(mountpoint)) == 300
        assert set(check_consistent(mountpoint / "tag-000")) == passed | {
            "memory.bin",
            "snapshot.json",
        }
        # Positions in a directory stay valid for two interleaved readers.
        with os.scandir(mountpoint / "tag-000") as one, os.scandir(mountpoint / "tag-000") as two:
            pairs = [(a.name, b.name) for a, b in zip(one, two, strict=True)]
        assert len(pairs) == 3002 and all(a == b for a, b in pairs)
        inodes = set()
        for n in range(300):
            status = (mountpoint / f"tag-{n:03}" / "memory.bin").stat()
            assert status.st_size == SIZE
            inodes.add(status.st_ino)
        assert len(inodes) == 300


def test_numbered_layers(public_path: Path, mountpoint: Path) -> None:
    store = public_path / "store"
    store.mkdir()
    layers = [BASE, DIFF, [(20 * PAGE, bytes(PAGE))]]
    names = ["000-base.mem", "1-num py.mem", os.fsdecode(b"002-\xff\n.mem")]
    tags = ["base", "num py", os.fsdecode(b"\xff\n")]
    files = [write_layer(store / name, SIZE, layers[n]) for n, name in enumerate(names)]
    seal_layer(files[1])
    for name in ("000-base.vmstate", "001-other.state", "notes.txt"):
        (store / name).write_text(name)
    (store / "1-dir").mkdir()
    os.mkfifo(store / "1-fifo.state")
    (store / "1-link.state").symlink_to("notes.txt")
    with unchanged(files), mounted(store, mountpoint):
        assert set(check_consistent(mountpoint)) == set(tags)
        for n, tag in enumerate(tags):
            memory = mountpoint / tag / names[n]
            assert memory.read_bytes() == overlay_oracle(SIZE, layers[: n + 1])
        assert set(check_consistent(mountpoint / "base")) == {names[0], "000-base.vmstate"}
        with_it = {"1-dir", "1-link.state", "001-other.state"}
        assert set(check_consistent(mountpoint / "num py")) == with_it | {names[1]}
        assert os.readlink(mountpoint / "num py" / "1-link.state") == "notes.txt"
        assert set(check_consistent(mountpoint / tags[2])) == {names[2]}
        assert (mountpoint / "num py" / "001-other.state").read_text() == "001-other.state"


def test_explicit_layers(public_path: Path, mountpoint: Path) -> None:
    base = write_layer(public_path / "mem_file", SIZE, BASE)
    diff = write_layer(public_path / "diff 1", SIZE, DIFF)
    (public_path / "a link").symlink_to(base)
    with (
        unchanged([base, diff]),
        mounted(None, mountpoint, "--base", str(public_path / "a link"), "--diff", str(diff)),
    ):
        assert set(check_consistent(mountpoint)) == {"a link"}
        assert (mountpoint / "a link").read_bytes() == MEMORY
        assert error_of(mountpoint / "mem_file") == errno.ENOENT
        assert os.statvfs(mountpoint).f_blocks * 4096 == SIZE
