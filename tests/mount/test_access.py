"""No user gets more access through a view than through its layers and their directories."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support import skips
from tests.support.images import PAGE, overlay_oracle
from tests.support.mounts import mounted
from tests.support.openat2 import exchange
from tests.support.stores import SIZE, pages, write_numbered, write_tag
from tests.support.superserve import write_sandbox, write_template
from tests.support.users import NOBODY, STRANGER, run_as

OWNER, GROUP = 23456, 34567
MEMORY = overlay_oracle(SIZE, [pages(0, range(15)), pages(1, [1])])

#: Users by their relation to a file of OWNER and GROUP, as (uid, gid).
PEOPLE = {"owner": (OWNER, OWNER), "group": (STRANGER, GROUP), "other": (STRANGER, STRANGER)}
ALL = frozenset(PEOPLE)


class Entry(NamedTuple):
    """Owner, group and mode of a file or directory, and an ACL line if it has one."""

    mode: int
    uid: int = OWNER
    gid: int = GROUP
    acl: str | None = None


class Case(NamedTuple):
    """The layers and their directories, the view's expected attributes, and its readers."""

    base: Entry
    diff: Entry
    expected: tuple[int, int, int]
    readers: frozenset[str] = frozenset()
    base_folder: Entry = Entry(0o755, 0, 0)
    folder: Entry = Entry(0o755, 0, 0)


CASES = {
    "secret": Case(Entry(0o600), Entry(0o600), (OWNER, GROUP, 0o400), frozenset({"owner"})),
    "open": Case(Entry(0o644), Entry(0o444), (OWNER, GROUP, 0o444), ALL),
    "group": Case(Entry(0o644), Entry(0o640), (OWNER, GROUP, 0o440), ALL - {"other"}),
    "and": Case(Entry(0o640), Entry(0o604), (OWNER, GROUP, 0o400), frozenset({"owner"})),
    "executable": Case(Entry(0o777), Entry(0o777), (OWNER, GROUP, 0o444), ALL),
    "not-owner": Case(Entry(0o044), Entry(0o644), (OWNER, GROUP, 0o044), ALL - {"owner"}),
    "mixed-open": Case(Entry(0o644), Entry(0o644, NOBODY), (0, 0, 0o444), ALL),
    "mixed-closed": Case(Entry(0o644), Entry(0o640, NOBODY), (0, 0, 0o400)),
    "mixed-groups": Case(Entry(0o640), Entry(0o640, OWNER, NOBODY), (0, 0, 0o400)),
    "acl": Case(
        Entry(0o644),
        Entry(0o644, acl=f"u:{STRANGER}:-"),
        (OWNER, GROUP, 0o400),
        frozenset({"owner"}),
    ),
    "acl-mixed": Case(Entry(0o644, NOBODY), Entry(0o644, acl=f"u:{STRANGER}:-"), (0, 0, 0o400)),
    "private-folder": Case(
        Entry(0o644),
        Entry(0o644),
        (OWNER, GROUP, 0o400),
        frozenset({"owner"}),
        folder=Entry(0o700),
    ),
    "private-parent": Case(
        Entry(0o644),
        Entry(0o644),
        (OWNER, GROUP, 0o400),
        frozenset({"owner"}),
        base_folder=Entry(0o700),
    ),
    "group-folder": Case(
        Entry(0o644),
        Entry(0o644),
        (OWNER, GROUP, 0o440),
        ALL - {"other"},
        base_folder=Entry(0o750),
        folder=Entry(0o710),
    ),
    "root-folder": Case(
        Entry(0o644), Entry(0o644), (OWNER, GROUP, 0), base_folder=Entry(0o700, 0, 0)
    ),
    "acl-folder": Case(
        Entry(0o644),
        Entry(0o644),
        (OWNER, GROUP, 0o400),
        frozenset({"owner"}),
        base_folder=Entry(0o755, acl=f"u:{STRANGER}:-"),
    ),
}


def set_entry(path: Path, entry: Entry) -> None:
    os.chown(path, entry.uid, entry.gid)
    path.chmod(entry.mode)
    if entry.acl:
        subprocess.run(["setfacl", "-m", entry.acl, path], check=True, timeout=60)


def can_read(who: str, path: Path) -> bool:
    done = run_as(*PEOPLE[who], ["/bin/cat", str(path)])
    assert done.returncode != 0 or len(done.stdout) == path.stat().st_size
    return done.returncode == 0


def owner_and_mode(path: Path) -> tuple[int, int, int]:
    status = path.lstat()
    return status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)


def write_case(store: Path, name: str, case: Case) -> None:
    base = write_tag(store, f"{name}-base")
    diff = write_tag(store, name, f"{name}-base", layer=1)
    set_entry(base / "memory.bin", case.base)
    set_entry(diff / "memory.bin", case.diff)
    set_entry(base, case.base_folder)
    set_entry(diff, case.folder)


def test_owner_and_mode_of_views(public_path: Path, mountpoint: Path) -> None:
    skips.require_root()
    store = public_path / "store"
    for name, case in CASES.items():
        write_case(store, name, case)
    with mounted(store, mountpoint, "--allow-other"):
        for name, case in CASES.items():
            view = mountpoint / name / "memory.bin"
            assert owner_and_mode(view) == case.expected, name
            assert {who for who in PEOPLE if can_read(who, view)} == case.readers, name
            # Each reader may really read all layers. Otherwise the view would give more access.
            for who in case.readers:
                for layer in (f"{name}-base", name):
                    assert can_read(who, store / layer / "memory.bin"), (name, who)
            assert view.read_bytes() == MEMORY


def test_other_files_and_directories_keep_owner_and_mode(
    public_path: Path, mountpoint: Path
) -> None:
    skips.require_root()
    store = public_path / "store"
    folder = write_tag(store, "base")
    (folder / "sub").mkdir()
    entries = {
        "vmstate": Entry(0o640),
        "snapshot.json": Entry(0o600),
        "sub": Entry(0o711),
        "sub/file": Entry(0o604, STRANGER, GROUP),
        "sub/listed": Entry(0o644, acl=f"u:{STRANGER}:-"),
    }
    for name, entry in entries.items():
        if name != "sub":
            (folder / name).touch()
        set_entry(folder / name, entry)
    os.symlink("vmstate", folder / "link")
    os.chown(folder / "link", OWNER, GROUP, follow_symlinks=False)
    set_entry(folder, Entry(0o751))
    set_entry(store, Entry(0o755, NOBODY, NOBODY))
    # Files that the mount shows in another directory than their own.
    pool = store / "pool"
    for n, mode in enumerate((0o700, 0o755)):
        (pool / f"{n}").mkdir(parents=True)
        (pool / f"{n}" / "far.state").write_bytes(b"far")
        set_entry(pool / f"{n}" / "far.state", Entry(0o644))
        set_entry(pool / f"{n}", Entry(mode, 0, 0))
        write_tag(store, f"far-{n}", vmstate=None)
        path = store / f"far-{n}" / "snapshot.json"
        path.write_text(f'{{"memory": "memory.bin", "vmstate": "{pool}/{n}/far.state"}}')
    with mounted(store, mountpoint, "--allow-other"):
        for name in (*(name for name in entries if name != "sub/listed"), "link", "."):
            assert owner_and_mode(mountpoint / "base" / name) == owner_and_mode(folder / name)
        assert owner_and_mode(mountpoint / "base/sub/listed") == (OWNER, GROUP, 0o400)
        assert owner_and_mode(mountpoint) == (NOBODY, NOBODY, 0o755)
        base = mountpoint / "base"
        assert {who for who in PEOPLE if can_read(who, base / "vmstate")} == {"owner", "group"}
        assert {who for who in PEOPLE if can_read(who, base / "snapshot.json")} == {"owner"}
        names = run_as(STRANGER, STRANGER, ["/bin/ls", str(base / "sub")])
        assert names.returncode != 0
        assert not any(can_read(who, mountpoint / "far-0" / "far.state") for who in PEOPLE)
        assert all(can_read(who, mountpoint / "far-1" / "far.state") for who in PEOPLE)
        for n in range(2):
            listed = {e.name: e.stat().st_mode for e in os.scandir(mountpoint / f"far-{n}")}
            assert listed["far.state"] == (mountpoint / f"far-{n}" / "far.state").stat().st_mode


@pytest.mark.parametrize("kind", ["store", "explicit"])
def test_a_private_directory_above_all(public_path: Path, mountpoint: Path, kind: str) -> None:
    skips.require_root()
    private = public_path / "private"
    store = write_numbered(private / "store", ["000-base.mem", "001-one.mem"])
    base, diff = store / "000-base.mem", store / "001-one.mem"
    for path in (base, diff, store, private):
        os.chown(path, OWNER, GROUP)
    private.chmod(0o700)
    # A link from a public place does not make it less private.
    (public_path / "link").symlink_to(store)
    if kind == "store":
        source, options, view = public_path / "link", [], mountpoint / "one" / "001-one.mem"
    else:
        (public_path / "base link").symlink_to(base)
        options = ["--base", str(public_path / "base link"), "--diff", str(diff)]
        source, view = None, mountpoint / "base link"
    with mounted(source, mountpoint, "--allow-other", *options):
        assert {who for who in PEOPLE if can_read(who, view)} == {"owner"}
        assert owner_and_mode(view) == (OWNER, GROUP, 0o400)
        assert run_as(STRANGER, STRANGER, ["/bin/ls", str(mountpoint)]).returncode != 0
        assert view.read_bytes() == MEMORY


def test_without_allow_other_no_other_user_has_access(public_path: Path, mountpoint: Path) -> None:
    skips.require_root()
    store = write_numbered(public_path / "store", ["000-base.mem", "001-one.mem"])
    with mounted(store, mountpoint):
        assert (mountpoint / "one" / "001-one.mem").read_bytes() == MEMORY
        for command in ("/bin/ls", "/bin/cat", "/usr/bin/stat"):
            path = mountpoint / "one" / "001-one.mem" if command != "/bin/ls" else mountpoint
            done = run_as(STRANGER, STRANGER, [command, str(path)], env={"LC_ALL": "C"})
            assert done.returncode != 0 and b"Permission denied" in done.stderr


def test_a_changed_mode_applies_to_new_opens(public_path: Path, mountpoint: Path) -> None:
    skips.require_root()
    store = write_numbered(public_path / "store", ["000-base.mem", "001-one.mem"])
    view = mountpoint / "one" / "001-one.mem"

    def wait_for(readers: set[str]) -> None:
        deadline = time.monotonic() + 10
        while (found := {who for who in PEOPLE if can_read(who, view)}) != readers:
            assert time.monotonic() < deadline, f"{found} still read it"
            time.sleep(0.1)

    with mounted(store, mountpoint, "--allow-other"):
        wait_for(set(ALL))
        script = 'exec 3< "$1"; head -c 4096 <&3; echo opened; read x; exec cat <&3'
        with subprocess.Popen(
            ["/bin/sh", "-c", script, "sh", str(view)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            user=STRANGER,
            group=STRANGER,
            extra_groups=[],
        ) as reader:
            try:
                assert reader.stdout is not None
                assert reader.stdout.read(PAGE) == MEMORY[:PAGE]
                assert reader.stdout.readline() == b"opened\n"
                # The base, though the view has the name of another file.
                (store / "000-base.mem").chmod(0o600)
                wait_for(set())
                rest, _ = reader.communicate(b"\n", timeout=60)
                assert MEMORY.endswith(rest) and rest
            finally:
                reader.kill()
        assert view.read_bytes() == MEMORY
        (store / "000-base.mem").chmod(0o644)
        wait_for(set(ALL))
        store.chmod(0o700)
        wait_for(set())
        store.chmod(0o755)
        wait_for(set(ALL))
        os.chown(store / "001-one.mem", OWNER, GROUP)
        (store / "001-one.mem").chmod(0o400)
        wait_for(set())


def until_stale(fd: int, mode: int) -> None:
    """Wait until `fd` is stale, and require that its file never has another mode before."""
    deadline = time.monotonic() + 10
    while True:
        try:
            status = os.fstat(fd)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            return
        assert stat.S_IMODE(status.st_mode) == mode
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(("name", "below"), [("secret", ""), ("folder", "/file")])
def test_another_file_at_the_path_is_not_opened_for_a_passed_node(
    public_path: Path, mountpoint: Path, name: str, below: str
) -> None:
    skips.require_root()
    store = public_path / "store"
    folder = write_tag(store, "base")
    (folder / "secret").write_bytes(b"secret")
    set_entry(folder / "secret", Entry(0o600, 0, 0))
    (folder / "folder").mkdir()
    (folder / "folder" / "file").write_bytes(b"secret")
    set_entry(folder / "folder", Entry(0o700, 0, 0))
    bait = public_path / "bait"
    (bait / "folder").mkdir(parents=True)
    (bait / "secret").write_bytes(b"a bait")
    (bait / "folder" / "file").write_bytes(b"a bait")
    with mounted(store, mountpoint, "--allow-other"):
        fd = os.open(mountpoint / "base" / name, os.O_PATH)
        try:
            mode = stat.S_IMODE((folder / name).stat().st_mode)
            assert stat.S_IMODE(os.fstat(fd).st_mode) == mode
            exchange(folder / name, bait / name)
            until_stale(fd, mode)
            done = run_as(
                STRANGER, STRANGER, ["/bin/cat", f"/proc/self/fd/{fd}{below}"], pass_fds=[fd]
            )
            assert (done.returncode, done.stdout) != (0, b"secret")
            exchange(folder / name, bait / name)
            done = run_as(
                STRANGER, STRANGER, ["/bin/cat", f"/proc/self/fd/{fd}{below}"], pass_fds=[fd]
            )
            assert done.returncode != 0 and done.stdout == b""
            assert stat.S_IMODE(os.fstat(fd).st_mode) == mode
        finally:
            os.close(fd)


def test_an_image_whose_layers_were_closed_to_others_is_not_opened_anew(
    public_path: Path, mountpoint: Path
) -> None:
    skips.require_root()
    store = write_numbered(public_path / "store", ["000-base.mem", "001-one.mem"])
    view = mountpoint / "one" / "001-one.mem"
    command = ["/bin/cat", "/proc/self/fd/{}"]
    with mounted(store, mountpoint, "--allow-other"), view.open("rb") as held:
        fd = os.open(view, os.O_PATH)
        try:
            command[1] = command[1].format(fd)
            assert run_as(STRANGER, STRANGER, command, pass_fds=[fd]).stdout == MEMORY
            (store / "000-base.mem").chmod(0o600)
            deadline = time.monotonic() + 10
            while can_read("other", view):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            # It is still the old file, with the old mode.
            assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o444
            assert held.read() == MEMORY
            done = run_as(STRANGER, STRANGER, command, pass_fds=[fd])
            assert done.returncode != 0 and done.stdout == b""
        finally:
            os.close(fd)


def test_an_open_passed_file_has_attributes_even_if_another_is_at_its_path(
    public_path: Path, mountpoint: Path
) -> None:
    store = public_path / "store"
    log = write_tag(store, "base") / "log"
    log.write_bytes(b"log of base")
    (store / "base" / "next").write_bytes(b"another, longer log of base")
    with mounted(store, mountpoint), (mountpoint / "base" / "log").open("rb") as file:
        known = os.fstat(file.fileno())
        (store / "base" / "next").rename(log)
        deadline = time.monotonic() + 10
        while (mountpoint / "base" / "log").stat().st_ino == known.st_ino:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert os.fstat(file.fileno()).st_size == known.st_size
        assert file.read() == b"log of base"


def test_the_directories_between_count_for_a_tag_of_several_components(
    public_path: Path, mountpoint: Path
) -> None:
    skips.require_root()
    store = public_path / "store"
    base = write_template(store)
    for user in ("u1", "u2"):
        write_sandbox(store, f"{user}/box", base)
    for path in sorted(store.rglob("*")):
        set_entry(path, Entry(0o755 if path.is_dir() else 0o644))
    (store / "u1").chmod(0o700)
    (store / "u2").chmod(0o710)

    def lists(who: str) -> bool:
        return run_as(*PEOPLE[who], ["/bin/ls", str(mountpoint)]).returncode == 0

    with mounted(store, mountpoint, "--allow-other"):
        for tag, readers in (("u1+box", {"owner"}), ("u2+box", {"owner", "group"})):
            for name in ("vmstate.snap", "mem.diff"):
                path = mountpoint / tag / name
                assert {who for who in PEOPLE if can_read(who, path)} == readers, path
        assert all(can_read(who, mountpoint / "templates+python" / "mem.snap") for who in PEOPLE)
        # The tags' names reveal the content of u1, which only its owner may list.
        assert stat.S_IMODE(mountpoint.stat().st_mode) == 0o711
        assert {who for who in PEOPLE if lists(who)} == set()
        assert sorted(os.listdir(mountpoint)) == ["templates+python", "u1+box", "u2+box"]


def exchange_until(one: Path, other: Path, reader: subprocess.Popen[bytes]) -> None:
    while reader.poll() is None:
        exchange(one, other)
        time.sleep(0.001)


def test_an_attacker_who_exchanges_directories_never_reads_the_guest(
    public_path: Path, mountpoint: Path
) -> None:
    """A real attack: SOURCE is another user's, the directory of the guest is not."""
    skips.require_root()
    store = public_path / "store"
    secret, bait = write_tag(store, "secret", layer=1), write_tag(public_path, "bait", layer=2)
    set_entry(secret, Entry(0o700, 0, 0))
    for folder in (secret, bait):
        (folder / "vmstate").write_bytes(b"state of " + os.fsencode(folder.name))
        for name in ("memory.bin", "vmstate"):
            set_entry(folder / name, Entry(0o644, 0, 0))
    guest = overlay_oracle(SIZE, [pages(1, range(15))])
    script = (
        'while :; do for f in memory.bin vmstate; do cat "$1/$f" 2>/dev/null && echo; done; done'
    )
    view = mountpoint / "secret"
    with (
        mounted(store, mountpoint, "--allow-other", expect_log=("secret: ",)),
        subprocess.Popen(
            ["/bin/sh", "-c", script, "sh", str(view)],
            stdout=subprocess.PIPE,
            user=STRANGER,
            group=STRANGER,
            extra_groups=[],
        ) as reader,
    ):
        try:
            assert reader.stdout is not None
            threading.Timer(4, reader.kill).start()
            swaps = threading.Thread(target=exchange_until, args=(secret, bait, reader))
            swaps.start()
            found = reader.stdout.read()
            swaps.join()
        finally:
            reader.kill()
    assert b"state of secret" not in found
    assert guest[:PAGE] not in found and guest[-2 * PAGE : -PAGE] not in found
