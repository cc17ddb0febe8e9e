"""Layers that a process has open for writing: refused, and tolerated under a live mount."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from diffmergefs import apply_diff, open_chain, open_image
from diffmergefs.core.errors import LayerChangedError, WriterError
from diffmergefs.fuse.served import Store
from diffmergefs.opening import opener
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.opening.writers import Writers, writers
from tests.support import mounttable, skips
from tests.support.commands import diffmergefs, mistake, succeed
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.live import held, until
from tests.support.logged import warnings
from tests.support.mounts import mounted
from tests.support.stores import (
    BASE_PAGES,
    OLD_NS,
    SECOND_NS,
    SIZE,
    age,
    pages,
    write_chain,
    write_tag,
)
from tests.support.writers import is_leased, opened_for_writing

WRITER = 18
LEAF = overlay_oracle(SIZE, [pages(0, BASE_PAGES), pages(1, [1]), pages(2, [2])])


@pytest.fixture
def root(public_path: Path) -> Path:
    """base - work - leaf, and side beside work."""
    store = write_chain(public_path / "store", ["base", "work", "leaf"])
    write_tag(store, "side", "base", layer=3)
    return store


def memory(root: Path, tag: str) -> Path:
    return root / tag / "memory.bin"


def chain_of(root: Path) -> list[Path]:
    return [memory(root, tag) for tag in ("base", "work", "leaf")]


def explicit(root: Path) -> list[str | Path]:
    base, work, leaf = chain_of(root)
    return ["--base", base, "--diff", work, "--diff", leaf]


# Images


@pytest.mark.parametrize("tag", ["base", "work", "leaf"])
def test_a_chain_with_a_writer_is_refused_and_the_layer_named(root: Path, tag: str) -> None:
    base, *diffs = chain_of(root)
    path = memory(root, tag)
    with opened_for_writing(path):
        with pytest.raises(WriterError, match=f"^{path}: open for writing"):
            open_chain(base, diffs)
        with pytest.raises(WriterError, match=f"^{path}: open for writing"):
            open_image(root / "leaf")
    assert open_chain(base, diffs).overridden == []
    assert open_image(root / "leaf").overridden == []


def test_what_is_above_the_writer_does_not_matter_to_those_below(root: Path) -> None:
    with opened_for_writing(memory(root, "leaf")):
        for tag in ("base", "work", "side"):
            assert open_image(root / tag).overridden == []


def test_a_writer_that_is_vouched_for_is_a_line(root: Path) -> None:
    base, *diffs = chain_of(root)
    policy = TrustPolicy(allow_writers=True)
    with opened_for_writing(base):
        for found in (open_chain(base, diffs, policy), open_image(root / "leaf", policy)):
            (line,) = found.overridden
            assert line.startswith(f"--allow-writers overrides: {base}: open for writing")
            assert found.view.read(0, SIZE) == LEAF


def test_an_open_chain_keeps_no_leases(root: Path) -> None:
    base, *diffs = chain_of(root)
    found = open_chain(base, diffs)
    assert not any(is_leased(path) for path in (base, *diffs))
    assert found.view.read(0, SIZE) == LEAF


def test_apply_refuses_a_diff_with_a_writer_and_leaves_the_base_alone(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, diff = memory(root, "base"), memory(root, "work")
    before = base.read_bytes()
    with opened_for_writing(diff):
        with pytest.raises(WriterError, match=f"^{diff}: open for writing"):
            apply_diff(diff, base)
        assert base.read_bytes() == before
        policy = TrustPolicy(allow_writers=True)
        assert apply_diff(diff, base, policy=policy, force={"layer"}) == PAGE
    assert base.read_bytes()[PAGE : 2 * PAGE] == signed(1, PAGE, PAGE)
    line, _ = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert line.startswith(f"--allow-writers overrides: {diff}: open for writing")


# Stores


def looked(root: Path, policy: TrustPolicy | None = None) -> Store:
    store = Store(str(root), policy or TrustPolicy(), clock=lambda: OLD_NS + 100 * SECOND_NS)
    store.look()
    return store


def refused(store: Store) -> set[str]:
    found = set()
    for tag in store.tags():
        try:
            store.open(tag)
        except WriterError:
            found.add(tag)
    return found


def test_a_tag_with_a_writer_and_its_descendants_are_refused_until_it_is_closed(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    store = looked(root)
    with opened_for_writing(memory(root, "work")):
        for _ in range(3):
            assert refused(store) == {"work", "leaf"}
            with pytest.raises(WriterError, match=r"^work/memory\.bin: open for writing"):
                store.opened("leaf")
            store.look()
        said = "its memory file is not shown: work/memory.bin: open for writing, perhaps"
        lines = sorted(line.partition(" by its VMM")[0] for line in warnings(caplog))
        assert lines == [f"leaf: {said}", f"work: {said}"]
        caplog.clear()
    assert refused(store) == {"work", "leaf"}  # until the next look
    store.look()
    gone = "no layer of it is known to be open for writing any more"
    assert sorted(caplog.messages) == [f"{tag}: {gone}" for tag in ("leaf", "work")]
    assert refused(store) == set()
    assert store.open("leaf").view.read(0, SIZE) == LEAF
    assert warnings(caplog) == []


def test_the_writer_of_another_layer_is_seen_by_the_next_look(root: Path) -> None:
    store = looked(root)
    with opened_for_writing(memory(root, "leaf")):
        with opened_for_writing(memory(root, "base")):
            assert refused(store) == {"base", "work", "leaf", "side"}
        store.look()
        assert refused(store) == {"leaf"}
    store.look()
    assert refused(store) == set()


def test_a_look_asks_once_about_each_layer(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def ask(fd: int) -> Writers:
        asked.append(os.fstat(fd).st_ino)
        return writers(fd)

    store = looked(root)
    with opened_for_writing(memory(root, "base")):
        assert refused(store) == {"base", "work", "leaf", "side"}
        monkeypatch.setattr(opener, "writers", ask)
        store.look()
        assert sorted(asked) == sorted(set(asked)) and asked
    asked.clear()
    store.look()
    assert len(asked) == len(set(asked)) == 4
    store.look()
    assert len(asked) == 4  # there is no refusal left


def test_a_layer_that_was_written_meanwhile_is_no_news_of_its_writer(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    store = looked(root)
    leaf = memory(root, "leaf")
    with opened_for_writing(leaf):
        assert refused(store) == {"leaf"}
        age(leaf, mtime_ns=OLD_NS + 1)
        store.look()
        caplog.clear()
        assert refused(store) == {"leaf"}  # judged anew: it is another content
    assert len(warnings(caplog)) == 1


def test_a_refused_tag_that_is_gone_is_no_news_of_its_writer(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    store = looked(root)
    with opened_for_writing(memory(root, "leaf")):
        assert refused(store) == {"leaf"}
        (root / "leaf").rename(root.parent / "away")
        caplog.clear()
        store.look()
    assert caplog.messages == ["leaf: gone"]


def test_a_store_that_may_have_writers_shows_all_with_a_line(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = looked(root, TrustPolicy(allow_writers=True))
    work = memory(root, "work")
    with opened_for_writing(work):
        assert refused(store) == set()
        lines = [line for line in warnings(caplog) if "--allow-writers overrides" in line]
        assert len(lines) == 2 and all(
            "work/memory.bin: open for writing" in line for line in lines
        )


def test_an_opener_for_writing_taints_no_view_and_a_store_does(root: Path) -> None:
    store = looked(root)
    shown = store.open("leaf")
    with opened_for_writing(*chain_of(root)):
        store.look()
        assert store.opened("leaf") is shown
        assert shown.view.read(0, SIZE) == LEAF
        assert refused(store) == {"base", "work", "side"}  # they are opened only now
    store.look()
    assert refused(store) == set()
    assert store.opened("leaf") is shown
    with memory(root, "work").open("r+b", buffering=0) as file:
        file.write(b"x")
    with pytest.raises(LayerChangedError):
        shown.view.read(0, SIZE)
    store.look()
    assert store.opened("leaf") is None


# The commands


def test_list_says_so_of_the_tag_and_its_descendants(root: Path) -> None:
    with opened_for_writing(memory(root, "work")):
        rows = {row["tag"]: row for row in json.loads(succeed("list", "--json", root))}
        table = succeed("list", root)
        done = diffmergefs("list", "--json", "--allow-writers", root)
    broken = {tag for tag, row in rows.items() if row["state"] == "broken"}
    assert broken == {"work", "leaf"}
    for tag in broken:
        assert rows[tag]["reason"].startswith("work/memory.bin: open for writing")
    (line,) = [line for line in table.splitlines() if line.startswith("leaf ")]
    assert "broken: work/memory.bin: open for writing" in line
    assert {row["state"] for row in json.loads(done.stdout)} == {"complete"}
    assert done.stderr.count("--allow-writers overrides: work/memory.bin: open for writing") == 2
    assert {row["state"] for row in json.loads(succeed("list", "--json", root))} == {"complete"}


def command(verb: str, root: Path) -> list[str | Path]:
    """One that reads leaf's chain, and whose output is a new file."""
    work, base = memory(root, "work"), root.parent / "copy"
    commands: dict[str, list[str | Path]] = {
        "info": ["info", root / "leaf"],
        "info-explicit": ["info", *explicit(root)],
        "flatten": ["flatten", root / "leaf", "-o", root.parent / "out"],
        "flatten-explicit": ["flatten", *explicit(root), "-o", root.parent / "out"],
        "apply": ["apply", work, base],
    }
    return commands[verb]


@pytest.mark.parametrize("verb", ["info", "info-explicit", "flatten", "flatten-explicit", "apply"])
def test_commands_refuse_a_writer(root: Path, verb: str) -> None:
    work, copy = memory(root, "work"), root.parent / "copy"
    copy.write_bytes(memory(root, "base").read_bytes())
    with opened_for_writing(work):
        line = mistake(WRITER, *command(verb, root))
        assert line.startswith(f"diffmergefs: {work}: open for writing")
        assert not (root.parent / "out").exists()
        assert copy.read_bytes() == memory(root, "base").read_bytes()
        name, *rest = command(verb, root)
        done = diffmergefs(name, "--allow-writers", *rest)
        assert done.returncode == 0
        assert done.stderr.startswith(f"diffmergefs: --allow-writers overrides: {work}: open for")
        assert done.stderr.count("\n") == 1
    if verb.startswith("flatten"):
        assert (root.parent / "out").read_bytes() == LEAF


def test_verify_counts_a_writer_as_a_fault(root: Path) -> None:
    work = memory(root, "work")
    with opened_for_writing(work):
        done = diffmergefs("verify", root / "leaf")
        assert done.returncode == 1
        text = done.stdout + done.stderr
        assert sum(f"{work}: open for writing" in line for line in text.splitlines()) == 1
        assert diffmergefs("verify", "--allow-writers", root / "leaf").returncode == 0
    assert diffmergefs("verify", root / "leaf").returncode == 0


# Mounts


@contextmanager
def in_background(mountpoint: Path, log: Path, *arguments: str | Path) -> Iterator[None]:
    """A mount whose command has returned; unmounted at the end."""
    skips.require_fuse()
    done = diffmergefs("mount", "--log", log, *arguments, mountpoint)
    assert done.returncode == 0, done
    try:
        yield
    finally:
        assert diffmergefs("umount", "--lazy", mountpoint).returncode == 0


@pytest.mark.parametrize("front", [[], ["-f"]])
def test_explicit_layers_with_a_writer_are_not_mounted(
    root: Path, mountpoint: Path, front: list[str]
) -> None:
    work = memory(root, "work")
    with opened_for_writing(work):
        arguments = [*front, "--log", root.parent / "log", *explicit(root), mountpoint]
        line = mistake(WRITER, "mount", *arguments)
    assert line.startswith(f"diffmergefs: {work}: open for writing")
    assert mounttable.at(str(mountpoint)) == []


def test_explicit_layers_with_a_writer_that_is_vouched_for(
    root: Path, mountpoint: Path, tmp_path: Path
) -> None:
    work = memory(root, "work")
    expected = f"--allow-writers overrides: {work}: open for writing"
    with opened_for_writing(work):
        options = ["--allow-writers", *map(str, explicit(root))]
        with mounted(None, mountpoint, *options, expect_log=(expected,)) as mount:
            assert expected in mount.log()
            assert (mountpoint / "memory.bin").read_bytes() == LEAF
        done = diffmergefs("mount", "-o", "allow_writers", *explicit(root), mountpoint)
        assert done.returncode == 0 and expected in done.stderr
        try:
            assert (mountpoint / "memory.bin").read_bytes() == LEAF
        finally:
            assert diffmergefs("umount", mountpoint).returncode == 0


def test_a_tag_enters_a_mounted_store_when_its_writer_is_done(root: Path, mountpoint: Path) -> None:
    view = mountpoint / "leaf" / "memory.bin"
    expected = "its memory file is not shown: work/memory.bin: open for writing"
    with mounted(root, mountpoint, expect_log=(expected,)) as mount:
        with opened_for_writing(memory(root, "work")):
            with pytest.raises(OSError) as failed:
                view.read_bytes()
            assert failed.value.errno == errno.EBUSY
            assert sorted(os.listdir(mountpoint / "leaf")) == ["snapshot.json", "vmstate"]
            assert (mountpoint / "side" / "memory.bin").stat().st_size == SIZE
            assert mount.log().count(f"leaf: {expected}") == 1
        until(lambda: "memory.bin" in os.listdir(view.parent), "the tag did not come back")
        assert view.read_bytes() == LEAF


def serving(root: Path, kind: str) -> tuple[list[str | Path], Path]:
    """The operands of a mount that shows leaf, and where it does."""
    if kind == "store":
        return [root], Path("leaf") / "memory.bin"
    return explicit(root), Path("memory.bin")


@pytest.mark.parametrize("kind", ["store", "explicit"])
def test_an_opener_of_a_layer_is_let_through_and_no_view_minds(
    root: Path, mountpoint: Path, tmp_path: Path, kind: str
) -> None:
    operands, name = serving(root, kind)
    log = tmp_path / "log"
    view = mountpoint / name
    with in_background(mountpoint, log, *operands), held(view) as vmm:
        inode = view.stat().st_ino
        assert vmm.read(0, 2 * PAGE) == LEAF[: 2 * PAGE]
        with opened_for_writing(*chain_of(root)):
            assert vmm.read(2 * PAGE, 2 * PAGE) == LEAF[2 * PAGE : 4 * PAGE]
            assert view.read_bytes() == LEAF
        with opened_for_writing(*chain_of(root)):
            pass
        assert (view.stat().st_ino, view.read_bytes()) == (inode, LEAF)
        assert vmm.read(0, SIZE) == LEAF
        assert " WARNING " not in log.read_text()
        vmm.end()  # the pages of a mapping would stay, old and right
        with memory(root, "work").open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"x", PAGE)
            os.fsync(file.fileno())
        until(lambda: is_lost(view), "nobody noticed the store")
    assert "work/memory.bin: " in log.read_text().partition(" WARNING ")[2]


def is_lost(view: Path) -> bool:
    """Whether work's page cannot be read any more, once the kernel has forgotten it."""
    try:
        with view.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.pread(file.fileno(), PAGE, PAGE)
    except OSError as error:
        return error.errno in (errno.EIO, errno.ENOENT)
    return False


@contextmanager
def qemu_on(path: Path) -> Iterator[None]:
    """QEMU with the file as a machine's memory, mapped privately; it opens it read-write."""
    memory = f"memory-backend-file,id=m,size={SIZE},mem-path={path},share=off"
    options = ["-machine", "none", "-S", "-display", "none", "-qmp", "stdio", "-object", memory]
    process = subprocess.Popen(
        ["qemu-system-x86_64", *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b'{"QMP"')  # the memory is there by then
        yield
    finally:
        process.kill()
        process.communicate(timeout=60)


def test_qemu_on_a_base_of_its_own_disturbs_no_view(
    root: Path, mountpoint: Path, tmp_path: Path
) -> None:
    base = memory(root, "base")
    with in_background(mountpoint, tmp_path / "log", root):
        view = mountpoint / "leaf" / "memory.bin"
        with held(view) as vmm:
            assert vmm.read(0, PAGE) == LEAF[:PAGE]
            with qemu_on(base):
                assert vmm.read(0, SIZE) == view.read_bytes() == LEAF
            assert view.read_bytes() == LEAF
        assert " WARNING " not in (tmp_path / "log").read_text()


def test_the_signal_of_a_broken_lease_ends_no_mount(root: Path, mountpoint: Path) -> None:
    with mounted(root, mountpoint) as mount:
        for _ in range(100):
            os.kill(mount.pid, signal.SIGURG)
        assert (mountpoint / "leaf" / "memory.bin").read_bytes() == LEAF


def test_what_cannot_be_told_is_shown_with_a_line(public_path: Path, mountpoint: Path) -> None:
    """Another user's layer, without CAP_LEASE."""
    skips.require_root()
    path = write_layer(public_path / "base", SIZE, pages(0, BASE_PAGES))
    os.chown(path, 23456, 23456)
    line = f"{path}: cannot tell whether it is open for writing: it belongs to another user"
    command = ["setpriv", "--bounding-set=-lease", "--inh-caps=-lease", sys.executable, "-m"]
    mount: list[str | Path] = [
        *command,
        "diffmergefs",
        "mount",
        f"--log={public_path}/log",
        "--base",
        path,
    ]
    assert subprocess.run([*mount, mountpoint], timeout=60).returncode == 0
    try:
        assert (mountpoint / "base").read_bytes() == path.read_bytes()
    finally:
        assert diffmergefs("umount", mountpoint).returncode == 0
    assert line in (public_path / "log").read_text()
