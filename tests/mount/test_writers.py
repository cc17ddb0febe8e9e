"""Layers that someone has open for writing: refused, and noticed under a live mount."""

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
from diffmergefs.opening.writers import SIGNAL, Leases, Writers, writers
from tests.support import mounttable, skips
from tests.support.commands import diffmergefs, mistake, succeed
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.live import Gate, held, patch_children, until
from tests.support.mounts import mounted
from tests.support.stores import (
    BASE_PAGES,
    OLD_NS,
    SECOND_NS,
    SIZE,
    age,
    pages,
    write_chain,
    write_numbered,
    write_tag,
)
from tests.support.writers import (
    PATIENCE_SECONDS,
    break_leases,
    lease_holders,
    opened_for_writing,
)

WRITER = 18
LEAF = bytes(overlay_oracle(SIZE, [pages(0, BASE_PAGES), pages(1, [1]), pages(2, [2])]))


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


def require_long_leases() -> None:
    # Or a lease that nobody gives back would not be noticed.
    limit = int(Path("/proc/sys/fs/lease-break-time").read_text(encoding="ascii"))
    assert limit > PATIENCE_SECONDS


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


def test_a_chain_keeps_leases_only_for_those_who_serve_it(root: Path) -> None:
    base, *diffs = chain_of(root)
    found = open_chain(base, diffs)
    assert not any(lease_holders(path) for path in (base, *diffs))
    served = open_chain(base, diffs, leases=Leases())
    assert all(lease_holders(path) == {os.getpid()} for path in (base, *diffs))
    assert found.view.read(0, SIZE) == served.view.read(0, SIZE)


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


def looked(root: Path, policy: TrustPolicy | None = None, leases: Leases | None = None) -> Store:
    store = Store(
        str(root),
        policy or TrustPolicy(),
        leases=leases,
        clock=lambda: OLD_NS + 100 * SECOND_NS,
    )
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


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("keep", [False, True])
def test_a_tag_with_a_writer_and_its_descendants_are_refused_until_it_is_closed(
    root: Path, keep: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    store = looked(root, leases=Leases() if keep else None)
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
    store = looked(root, TrustPolicy(allow_writers=True), Leases())
    work = memory(root, "work")
    with opened_for_writing(work):
        assert refused(store) == set()
        lines = [line for line in warnings(caplog) if "--allow-writers overrides" in line]
        assert len(lines) == 2 and all(
            "work/memory.bin: open for writing" in line for line in lines
        )
        assert lease_holders(work) == set()
        assert lease_holders(memory(root, "base")) == {os.getpid()}


def test_a_broken_lease_taints_no_view_and_a_store_does(root: Path) -> None:
    leases = Leases()
    store = looked(root, leases=leases)
    shown = store.open("leaf")
    break_leases(chain_of(root))
    leases.answer_breaks()
    with opened_for_writing(*chain_of(root)):
        store.look()
        assert store.opened("leaf") is shown
        assert shown.view.read(0, SIZE) == LEAF
        assert refused(store) == {"base", "work", "side"}  # they are opened only now
    store.look()
    assert refused(store) == set()
    assert store.opened("leaf") is shown
    break_leases([memory(root, "work")])
    leases.answer_breaks()
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
    return {
        "info": ["info", root / "leaf"],
        "info-explicit": ["info", *explicit(root)],
        "flatten": ["flatten", root / "leaf", "-o", root.parent / "out"],
        "flatten-explicit": ["flatten", *explicit(root), "-o", root.parent / "out"],
        "apply": ["apply", work, base],
    }[verb]


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
def in_background(mountpoint: Path, log: Path, *arguments: str | Path) -> Iterator[int]:
    """A mount whose command has returned; its daemon's pid. Unmounted again."""
    skips.require_fuse()
    done = diffmergefs("mount", "--log", log, *arguments, mountpoint)
    assert done.returncode == 0, done
    try:
        yield daemon_of(mountpoint)
    finally:
        assert diffmergefs("umount", "--lazy", mountpoint).returncode == 0


def daemon_of(mountpoint: Path) -> int:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            arguments = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if os.fsencode(mountpoint) in arguments and b"mount" in arguments:
            found.append(int(name))
    (pid,) = found
    return pid


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


def told_of(log: str, path: Path) -> int:
    name = Path(path.parent.name) / path.name
    return sum(
        f"{name}: opened for writing by someone; its views fail if it is written to" in line
        for line in log.splitlines()
    )


@pytest.mark.parametrize("kind", ["store", "explicit"])
def test_an_opener_of_a_layer_is_let_through_and_no_view_minds(
    root: Path, mountpoint: Path, tmp_path: Path, kind: str
) -> None:
    require_long_leases()
    operands, name = serving(root, kind)
    log = tmp_path / "log"
    view = mountpoint / name
    with in_background(mountpoint, log, *operands) as pid, held(view) as vmm:
        inode = view.stat().st_ino
        assert vmm.read(0, 2 * PAGE) == LEAF[: 2 * PAGE]
        for path in chain_of(root):
            # Those that only the process that serves can give back.
            assert lease_holders(path) == {pid}
        with opened_for_writing(*chain_of(root)):
            assert vmm.read(2 * PAGE, 2 * PAGE) == LEAF[2 * PAGE : 4 * PAGE]
            assert view.read_bytes() == LEAF
        with opened_for_writing(*chain_of(root)):
            pass
        assert [told_of(log.read_text(), path) for path in chain_of(root)] == [1, 1, 1]
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


def test_many_leases_broken_at_once_are_all_given_back(public_path: Path, mountpoint: Path) -> None:
    """Their signals coalesce: the daemon is stopped while all of them are sent."""
    require_long_leases()
    names = [f"{n:03}-t{n}.mem" for n in range(60)]
    store = write_numbered(public_path / "store", names)
    paths = [store / name for name in names]
    with mounted(store, mountpoint) as mount:
        view = mountpoint / "t59" / names[-1]
        before = view.read_bytes()
        os.kill(mount.pid, signal.SIGSTOP)
        try:
            break_leases(paths)
        finally:
            os.kill(mount.pid, signal.SIGCONT)
        with opened_for_writing(*paths):
            assert view.read_bytes() == before
        said = [f"{name}: opened for writing by someone" for name in names]
        until(lambda: all(line in mount.log() for line in said), "not all were told of")


def test_an_opener_waits_for_less_than_a_second(public_path: Path, mountpoint: Path) -> None:
    """One layer after the other. Of half of them it is asked, lest a busy machine fails the test.

    The kernel would have it wait until it takes the lease away by itself, which is far longer.
    """
    require_long_leases()
    names = [f"{n:03}-t{n}.mem" for n in range(20)]
    store = write_numbered(public_path / "store", names)
    paths = [store / name for name in names]
    with mounted(store, mountpoint) as mount:
        view = mountpoint / "t19" / names[-1]
        with held(view) as vmm:
            before = vmm.read(0, SIZE)
            assert all(lease_holders(path) == {mount.pid} for path in paths)
            with opened_for_writing(*paths) as opener:
                assert len(opener.waits) == len(paths)
                assert sorted(opener.waits)[len(paths) // 2] < 1, opener.waits
                assert not any(lease_holders(path) for path in paths)
            assert vmm.read(0, SIZE) == view.read_bytes() == before


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
    with in_background(mountpoint, tmp_path / "log", root) as pid:
        view = mountpoint / "leaf" / "memory.bin"
        with held(view) as vmm:
            assert vmm.read(0, PAGE) == LEAF[:PAGE]
            assert lease_holders(base) == {pid}
            with qemu_on(base):
                assert lease_holders(base) == set()  # it was broken, and given back
                assert vmm.read(0, SIZE) == view.read_bytes() == LEAF
            assert view.read_bytes() == LEAF
        text = (tmp_path / "log").read_text()
        assert told_of(text, base) == 1 and " WARNING " not in text


def test_the_signal_of_a_broken_lease_ends_no_mount(root: Path, mountpoint: Path) -> None:
    with mounted(root, mountpoint) as mount:
        for _ in range(100):
            os.kill(mount.pid, SIGNAL)
        assert (mountpoint / "leaf" / "memory.bin").read_bytes() == LEAF
        assert "opened for writing" not in mount.log()


def test_a_lease_that_is_broken_before_the_mount_listens_is_given_back(
    root: Path, public_path: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_long_leases()
    gate = Gate(public_path / "gate")
    patch_children(
        monkeypatch,
        public_path / "patch",
        gate.code + "import pyfuse3\n"
        "real = pyfuse3.init\n"
        "def init(*args):\n"
        "    wait_at_gate()\n"
        "    real(*args)\n"
        "pyfuse3.init = init\n",
    )
    log = public_path / "log"
    command = [sys.executable, "-m", "diffmergefs", "mount", "--log", log]
    process = subprocess.Popen([*command, *explicit(root), mountpoint])
    try:
        gate.wait_until_reached()
        break_leases(chain_of(root))
        gate.open()
        with opened_for_writing(*chain_of(root)):
            assert process.wait(60) == 0
            assert (mountpoint / "memory.bin").read_bytes() == LEAF
    finally:
        gate.open()
        process.wait(60)
        assert diffmergefs("umount", mountpoint).returncode == 0
    assert [told_of(log.read_text(), path) for path in chain_of(root)] == [1, 1, 1]


def test_a_failure_while_breaks_are_answered_ends_no_mount(
    root: Path, public_path: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_children(
        monkeypatch,
        public_path / "patch",
        "import diffmergefs.opening.writers as module\n"
        "def fail(self):\n"
        "    raise RuntimeError('by the test')\n"
        "module.Leases.answer_breaks = fail\n",
    )
    with mounted(root, mountpoint, expect_log=("this is a bug", "Traceback")) as mount:
        os.kill(mount.pid, SIGNAL)
        until(lambda: mount.log().count("RuntimeError: by the test") > 1, "it was not called")
        assert (mountpoint / "leaf" / "memory.bin").read_bytes() == LEAF


def test_what_cannot_be_told_is_shown_with_a_line(public_path: Path, mountpoint: Path) -> None:
    """Another user's layer, without CAP_LEASE."""
    skips.require_root()
    path = write_layer(public_path / "base", SIZE, pages(0, BASE_PAGES))
    os.chown(path, 23456, 23456)
    line = f"{path}: whether it is open for writing cannot be told: it belongs to another user"
    command = ["setpriv", "--bounding-set=-lease", "--inh-caps=-lease", sys.executable, "-m"]
    mount = [*command, "diffmergefs", "mount", f"--log={public_path}/log", "--base", path]
    assert subprocess.run([*mount, mountpoint], timeout=60).returncode == 0
    try:
        assert (mountpoint / "base").read_bytes() == path.read_bytes()
    finally:
        assert diffmergefs("umount", mountpoint).returncode == 0
    assert line in (public_path / "log").read_text()
