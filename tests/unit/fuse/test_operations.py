"""The handlers of the adapter, called as pyfuse3 calls them for the kernel."""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import tracemalloc
from collections.abc import Callable, Coroutine, Iterator, Sequence
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyfuse3
import pytest
import trio
import trio.testing

from diffmergefs.core.view import MergedView
from diffmergefs.fuse.handles import Handle
from diffmergefs.fuse.marks import mark_of_reads
from diffmergefs.fuse.nodes import ROOT_INODE, Inodes
from diffmergefs.fuse.operations import Operations
from diffmergefs.fuse.served import Store
from diffmergefs.fuse.tree import Tree
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.system.board import Mark
from diffmergefs.system.line import Line
from tests.support.images import PAGE, overlay_oracle, write_layer
from tests.support.stores import BASE_PAGES, SIZE, age, pages, write_chain
from tests.support.subjects.handover import Mount

CTX: Any = SimpleNamespace(pid=1)


def image_of(*layers: tuple[int, range | list[int]]) -> bytes:
    return overlay_oracle(SIZE, [pages(layer, numbers) for layer, numbers in layers])


@pytest.fixture
def operations(tmp_path: Path) -> Operations:
    store = Store(str(write_chain(tmp_path / "store", ["base", "leaf"])), TrustPolicy())
    store.look()
    return Operations(Tree("/somewhere", store))


async def walk(operations: Operations, *names: bytes) -> pyfuse3.EntryAttributes:
    inode, entry = ROOT_INODE, None
    for name in names:
        entry = await operations.lookup(inode, name, CTX)
        inode = entry.st_ino
    assert entry is not None
    return entry


async def listing(operations: Operations, inode: int, patch: pytest.MonkeyPatch) -> dict[str, int]:
    """All entries with their inodes, in replies that hold three entries each."""
    found: dict[str, int] = {}
    fh = await operations.opendir(inode, CTX)
    last, room = 0, 0

    def reply(token: object, name: bytes, entry: pyfuse3.EntryAttributes, next_id: int) -> bool:
        nonlocal last, room
        if room == 0:
            return False
        room -= 1
        assert os.fsdecode(name) not in found
        found[os.fsdecode(name)], last = entry.st_ino, next_id
        return True

    patch.setattr(pyfuse3, "readdir_reply", reply)
    while room == 0:
        room = 3
        await operations.readdir(fh, last, CTX)
    await operations.releasedir(fh)
    return found


async def errno_of(answer: Coroutine[Any, Any, object]) -> int:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await answer
    return caught.value.errno


def test_a_file_is_looked_up_opened_read_and_released(operations: Operations) -> None:
    async def main() -> None:
        entry = await walk(operations, b"leaf", b"memory.bin")
        assert (entry.st_size, entry.entry_timeout < 1, entry.attr_timeout > 10**6) == (
            SIZE,
            True,
            True,
        )
        info = await operations.open(entry.st_ino, os.O_RDONLY, CTX)
        assert info.keep_cache and not info.direct_io and operations.open_files == 1
        image = image_of((0, BASE_PAGES), (1, [1]))
        for off, size in ((0, SIZE), (PAGE - 1, 3), (SIZE - 5, 100), (SIZE, 1), (2**63 - 1, 9)):
            assert await operations.read(info.fh, off, size) == image[off : off + size]
        await operations.release(info.fh)
        await operations.release(info.fh)
        assert operations.open_files == 0
        assert await errno_of(operations.lookup(ROOT_INODE, b"none", CTX)) == errno.ENOENT
        assert await errno_of(operations.lookup(entry.st_ino, b"none", CTX)) == errno.ENOTDIR
        assert await errno_of(operations.open(ROOT_INODE, os.O_RDONLY, CTX)) == errno.EISDIR
        assert await errno_of(operations.open(entry.st_ino, os.O_TRUNC, CTX)) == errno.EROFS
        assert await errno_of(operations.readlink(ROOT_INODE, CTX)) == errno.EINVAL

    trio.run(main)


def test_directories_are_listed_in_small_replies(
    operations: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = operations.tree.store
    assert store is not None
    for n in range(200):
        (Path(store.root) / "leaf" / f"file-{n}").touch()

    async def main() -> None:
        folder = await walk(operations, b"leaf")
        found = await listing(operations, folder.st_ino, monkeypatch)
        assert len(found) == 203 and len(set(found.values())) == 203
        entry = await operations.lookup(folder.st_ino, b"file-7", CTX)
        assert entry.st_ino == found["file-7"]

    trio.run(main)


def test_forgotten_nodes_are_dropped_and_an_image_keeps_its_inode(
    operations: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        memory = (await walk(operations, b"leaf", b"memory.bin")).st_ino
        state = (await walk(operations, b"leaf", b"vmstate")).st_ino
        listed = await listing(operations, ROOT_INODE, monkeypatch)
        folder = listed["leaf"]
        for inode, counts in ((state, [1]), (memory, [1]), (folder, [1, 1, 1])):
            for count in counts:
                assert (await operations.getattr(inode, CTX)).st_ino == inode
                await operations.forget([(inode, count)])
            assert await errno_of(operations.getattr(inode, CTX)) == errno.ESTALE
        await operations.forget([(ROOT_INODE, 5), (state, 1)])
        assert (await operations.getattr(ROOT_INODE, CTX)).st_ino == ROOT_INODE
        assert (await walk(operations, b"leaf", b"memory.bin")).st_ino == memory
        assert (await walk(operations, b"leaf", b"vmstate")).st_ino not in (state, memory, folder)

    trio.run(main)


def test_every_change_is_refused(operations: Operations) -> None:
    async def main() -> None:
        for name in (
            *("setattr", "mknod", "mkdir", "unlink", "rmdir", "symlink", "rename", "link"),
            *("create", "write", "setxattr", "removexattr"),
        ):
            assert await errno_of(getattr(operations, name)(1, 2, 3)) == errno.EROFS
        assert await operations.listxattr(ROOT_INODE, CTX) == []
        assert await errno_of(operations.getxattr(1, b"user.x", CTX)) == errno.ENODATA

    trio.run(main)


# What breaks, and a request that meets it.
BUGS: dict[str, tuple[object, str, Callable[[Operations, int], Coroutine[Any, Any, object]]]] = {
    "lookup": (Tree, "child", lambda o, _: o.lookup(ROOT_INODE, b"leaf", CTX)),
    "getattr": (Tree, "attributes", lambda o, _: o.getattr(ROOT_INODE, CTX)),
    "opendir": (Tree, "names", lambda o, _: o.opendir(ROOT_INODE, CTX)),
    "open": (Inodes, "node", lambda o, inode: o.open(inode, os.O_RDONLY, CTX)),
    "readlink": (Inodes, "node", lambda o, inode: o.readlink(inode, CTX)),
    "statfs": (Store, "total_bytes", lambda o, _: o.statfs(CTX)),
    "read": (MergedView, "fill_nowait", lambda o, _: o.read(1, 0, PAGE)),
    "readdir": (Tree, "attributes", lambda o, _: o.readdir(2, 0, CTX)),
}


@pytest.mark.parametrize("handler", BUGS)
def test_a_bug_is_an_error_for_one_request(
    handler: str,
    operations: Operations,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # A test that ran the command line in this process turned it off.
    monkeypatch.setattr(logging.getLogger("diffmergefs"), "propagate", True)

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("on purpose")

    async def main() -> None:
        entry = await walk(operations, b"leaf", b"memory.bin")
        assert (await operations.open(entry.st_ino, os.O_RDONLY, CTX)).fh == 1
        assert await operations.opendir(ROOT_INODE, CTX) == 2
        owner, name, request = BUGS[handler]
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            assert await errno_of(request(operations, entry.st_ino)) == errno.EIO
        records = [r for r in caplog.records if r.levelno == logging.ERROR]
        assert [r.getMessage() for r in records] == [f"{handler} failed: this is a bug"]
        assert records[0].exc_info and "on purpose" in caplog.text
        assert len(await operations.read(1, 0, PAGE)) == PAGE

    trio.run(main)


def test_odd_handles_fail_alone(operations: Operations, tmp_path: Path) -> None:
    """An unknown handle, an offset beyond any file, and a file whose close fails."""

    async def main() -> None:
        assert await errno_of(operations.read(77, 0, 1)) == errno.EIO
        fd = os.open(tmp_path / "store" / "leaf" / "vmstate", os.O_RDONLY)
        operations.handles.by_number[5] = Handle(fd=fd)
        assert await errno_of(operations.read(5, 2**63, 1)) == errno.EIO
        assert await operations.read(5, 0, 5) == b"state"
        os.close(fd)
        await operations.release(5)  # it counts as closed even if close(2) fails
        assert operations.open_files == 0

    trio.run(main)


def test_many_open_directories_keep_one_listing(operations: Operations, tmp_path: Path) -> None:
    for number in range(2000):
        (tmp_path / "store" / "leaf" / f"{number:04}{'x' * 200}").touch()

    async def main() -> None:
        folder = (await walk(operations, b"leaf")).st_ino
        await operations.opendir(folder, CTX)
        gc.collect()
        tracemalloc.start()
        try:
            for _ in range(100):
                await operations.opendir(folder, CTX)
            gc.collect()
            taken, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert taken < 2_000_000  # four times what a single list of the names takes
        assert len({id(handle.names) for handle in operations.handles.by_number.values()}) == 1

    trio.run(main)


def test_documents_of_many_tags_take_the_memory_of_one(
    operations: Operations, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    document = {"memory": "memory.bin", "rootfs": "x" * 900_000}
    (store / "base" / "snapshot.json").write_text(json.dumps(document))
    tags = [f"link-{number}" for number in range(20)]
    for tag in tags:
        folder = store / tag
        folder.mkdir()
        write_layer(folder / "memory.bin", SIZE, [])
        os.link(store / "base" / "snapshot.json", folder / "snapshot.json")
    age(*store.rglob("*"))

    async def main() -> None:
        tracemalloc.start()
        try:
            assert operations.tree.store is not None
            operations.tree.store.look()
            operations.tree.store.look()
            found = [await walk(operations, os.fsencode(t), b"snapshot.json") for t in tags]
            inode = found[0].st_ino
            handles = [(await operations.open(inode, os.O_RDONLY, CTX)).fh for _ in tags]
            gc.collect()
            taken, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert taken < 4_000_000, taken
        read = await operations.read(handles[-1], 0, 2_000_000)
        assert json.loads(bytes(read))["rootfs"] == "x" * 900_000
        assert len(read) == found[0].st_size

    trio.run(main)


def test_entries_added_before_a_listing_failed_count_as_looked_up(
    operations: Operations, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel forgets exactly the entries that it received."""
    added: dict[str, int] = {}

    def reply(token: object, name: bytes, entry: pyfuse3.EntryAttributes, next_id: int) -> bool:
        added[os.fsdecode(name)] = entry.st_ino
        return True

    async def main() -> None:
        folder = await walk(operations, b"leaf")
        fh = await operations.opendir(folder.st_ino, CTX)
        real, batches = operations.tree.entries, 0

        def fails_at_the_second(folder: Any, names: Any) -> Any:
            nonlocal batches
            batches += 1
            if batches > 1:
                raise OSError(errno.ENOMEM, "on purpose")
            return real(folder, names)

        monkeypatch.setattr("diffmergefs.fuse.operations._READDIR_BATCH", 2)
        monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
        monkeypatch.setattr(operations.tree, "entries", fails_at_the_second)
        await operations.readdir(fh, 0, CTX)
        assert len(added) == 2
        assert await errno_of(operations.readdir(fh, 2, CTX)) == errno.ENOMEM
        assert len(added) == 2
        for inode in added.values():
            assert (await operations.getattr(inode, CTX)).st_ino == inode
            await operations.forget([(inode, 1)])
            assert await errno_of(operations.getattr(inode, CTX)) == errno.ESTALE

    trio.run(main)


def test_an_entry_without_room_is_not_remembered(
    operations: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: dict[str, int] = {}

    def no_room(token: object, name: bytes, entry: pyfuse3.EntryAttributes, next_id: int) -> bool:
        refused[os.fsdecode(name)] = entry.st_ino
        return False

    async def main() -> None:
        folder = await walk(operations, b"leaf")
        monkeypatch.setattr(pyfuse3, "readdir_reply", no_room)
        fh = await operations.opendir(folder.st_ino, CTX)
        await operations.readdir(fh, 0, CTX)
        ((name, inode),) = refused.items()
        assert await errno_of(operations.getattr(inode, CTX)) == errno.ESTALE
        # An entry that was looked up before stays.
        known = (await operations.lookup(folder.st_ino, os.fsencode(name), CTX)).st_ino
        await operations.readdir(fh, 0, CTX)
        assert refused == {name: known}
        assert (await operations.getattr(known, CTX)).st_ino == known

    trio.run(main)


def test_lookup_returns_the_image_just_opened_even_if_a_look_dropped_it(
    operations: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = operations.tree.store
    assert store is not None
    folder = Path(store.root) / "leaf"
    real = Store.open

    def open_and_look(self: Store, tag: str) -> object:
        shown = real(self, tag)
        if tag == "leaf" and not (folder / "was-changed").exists():
            (folder / "was-changed").touch()
            write_layer(folder / "new", SIZE, pages(5, [5])).rename(folder / "memory.bin")
            age(folder / "memory.bin")
            self.look()
            self.look()
            assert self.opened(tag) is None
        return shown

    monkeypatch.setattr(Store, "open", open_and_look)

    async def main() -> None:
        old = await walk(operations, b"leaf", b"memory.bin")
        assert old.st_size == SIZE
        while operations.opener.lanes.busy:  # the thread holds the image until it ends
            await trio.sleep(0.001)
        await (
            trio.testing.wait_all_tasks_blocked()
        )  # and trio holds the last value that it gave to a task
        gc.collect()
        # Nothing holds the image open: ESTALE makes the kernel look the name up again.
        assert await errno_of(operations.open(old.st_ino, os.O_RDONLY, CTX)) == errno.ESTALE
        new = await walk(operations, b"leaf", b"memory.bin")
        assert new.st_ino > old.st_ino
        info = await operations.open(new.st_ino, os.O_RDONLY, CTX)
        assert await operations.read(info.fh, 0, SIZE) == image_of((0, BASE_PAGES), (5, [5]))

    trio.run(main)


def test_an_open_file_keeps_an_image_that_a_look_dropped(operations: Operations) -> None:
    store = operations.tree.store
    assert store is not None
    folder = Path(store.root) / "leaf"

    async def main() -> None:
        entry = await walk(operations, b"leaf", b"memory.bin")
        info = await operations.open(entry.st_ino, os.O_RDONLY, CTX)
        write_layer(folder / "new", SIZE, pages(5, [5])).rename(folder / "memory.bin")
        age(folder / "memory.bin")
        store.look()
        gc.collect()
        assert (await operations.getattr(entry.st_ino, CTX)).st_size == SIZE
        assert await operations.read(info.fh, 0, SIZE) == image_of((0, BASE_PAGES), (1, [1]))
        await operations.release(info.fh)
        gc.collect()
        assert await errno_of(operations.getattr(entry.st_ino, CTX)) == errno.ESTALE

    trio.run(main)


def test_a_passed_file_is_read_in_full_even_if_read_is_short(
    operations: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = operations.tree.store
    assert store is not None
    content = bytes(range(256)) * 40
    (Path(store.root) / "leaf" / "note").write_bytes(content)
    preadv, pread = os.preadv, os.pread

    def little(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        return preadv(fd, [buffers[0][:1000]], offset, flags)

    async def main() -> None:
        entry = await walk(operations, b"leaf", b"note")
        info = await operations.open(entry.st_ino, os.O_RDONLY, CTX)
        monkeypatch.setattr(os, "preadv", little)
        monkeypatch.setattr(os, "pread", lambda fd, n, offset: pread(fd, min(n, 1000), offset))
        for off, size in ((0, len(content)), (5, 5000), (9000, 5000), (len(content), 10)):
            assert await operations.read(info.fh, off, size) == content[off : off + size]
        await operations.release(info.fh)

    trio.run(main)


# Servers, one after another


class Servers:
    """Each `next` goes on from where the one before ended."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.mount = Mount(root, patch)

    def next(self, *, suspects: Sequence[Mark] = (), poisoned: Sequence[Mark] = ()) -> Operations:
        self.line = self.mount.line()
        self.line.suspects, self.line.poisoned = frozenset(suspects), dict.fromkeys(poisoned, inf)
        store = self.mount.store()
        assert store is not None
        operations = Operations(Tree("/somewhere", store))
        operations.take_over(cast(Line, self.line), self.mount.handover())
        return operations


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Servers]:
    found = Servers(write_chain(tmp_path / "store", ["base", "leaf"]), monkeypatch)
    yield found
    found.mount.close()


def test_a_successor_answers_as_the_server_before(servers: Servers) -> None:
    async def main() -> None:
        first = servers.next()
        entry = await walk(first, b"leaf", b"memory.bin")
        info = await first.open(entry.st_ino, os.O_RDONLY, CTX)
        state = await walk(first, b"leaf", b"vmstate")
        other = await first.open(state.st_ino, os.O_RDONLY, CTX)
        for _ in range(2):
            operations = servers.next()
            image = image_of((0, BASE_PAGES), (1, [1]))
            assert await operations.read(info.fh, 0, SIZE) == image
            assert await operations.read(other.fh, 0, 5) == b"state"
            assert operations.open_files == 2
            for known in (entry, state):
                again = await operations.getattr(known.st_ino, CTX)
                assert (again.st_ino, again.st_size) == (known.st_ino, known.st_size)
            again = await walk(operations, b"leaf", b"memory.bin")
            assert again.st_ino == entry.st_ino
            await operations.forget([(entry.st_ino, 1)])
        # Requests that were executed and not answered come again.
        for _ in range(2):
            await operations.release(other.fh)
        assert operations.open_files == 1

    trio.run(main)


def test_a_listing_under_way_goes_on_in_the_successor(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    last, room = 0, 2

    def reply(token: object, name: bytes, entry: pyfuse3.EntryAttributes, next_id: int) -> bool:
        nonlocal last
        if len(found) == room:
            return False
        found.append(os.fsdecode(name))
        last = next_id
        return True

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)

    async def main() -> None:
        nonlocal room
        operations = servers.next()
        folder = await walk(operations, b"leaf")
        fh = await operations.opendir(folder.st_ino, CTX)
        await operations.readdir(fh, last, CTX)
        assert len(found) == 2
        operations, room = servers.next(), 100
        await operations.readdir(fh, last, CTX)
        assert sorted(found) == ["memory.bin", "snapshot.json", "vmstate"]
        await operations.releasedir(fh)
        await operations.releasedir(fh)

    trio.run(main)


def test_what_was_lost_is_an_error_and_can_be_opened_anew(
    servers: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        operations = servers.next()
        entry = await walk(operations, b"leaf", b"memory.bin")
        info = await operations.open(entry.st_ino, os.O_RDONLY, CTX)
        for number in list(servers.mount.kept):
            servers.mount.kept.pop(number)
        operations = servers.next()
        assert await errno_of(operations.read(info.fh, 0, PAGE)) == errno.EIO
        assert "this is a bug" not in caplog.text
        await operations.release(info.fh)
        assert await errno_of(operations.getattr(entry.st_ino, CTX)) == errno.ESTALE
        entry = await walk(operations, b"leaf", b"memory.bin")
        info = await operations.open(entry.st_ino, os.O_RDONLY, CTX)
        assert await operations.read(info.fh, 0, SIZE) == image_of((0, BASE_PAGES), (1, [1]))

    trio.run(main)


def test_a_poisoned_read_is_refused_and_other_reads_are_answered(servers: Servers) -> None:
    async def main() -> None:
        operations = servers.next()
        entry = await walk(operations, b"leaf", b"memory.bin")
        info = await operations.open(entry.st_ino, os.O_RDONLY, CTX)
        mark = (mark_of_reads(entry.st_ino) + 2, 0, 0, 0)
        operations = servers.next(poisoned=[mark])
        for offset in (2 * PAGE, 2 * PAGE + 5):
            assert await errno_of(operations.read(info.fh, offset, PAGE)) == errno.EIO
        assert len(await operations.read(info.fh, 3 * PAGE, PAGE)) == PAGE
        assert not servers.mount.board.in_hand()

    trio.run(main)


@pytest.mark.parametrize("waits", [False, True])
def test_a_read_is_marked_while_it_is_in_hand(
    waits: bool, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    fill, fill_nowait = MergedView.fill, MergedView.fill_nowait

    def slowly(view: MergedView, *rest: Any) -> None:
        seen.append(servers.mount.board.in_hand())
        fill(view, *rest)

    def at_once(view: MergedView, *rest: Any) -> int:
        seen.append(servers.mount.board.in_hand())
        return 0 if waits else fill_nowait(view, *rest)

    monkeypatch.setattr(MergedView, "fill", slowly)
    monkeypatch.setattr(MergedView, "fill_nowait", at_once)

    async def main() -> None:
        operations = servers.next()
        entry = await walk(operations, b"leaf", b"memory.bin")
        info = await operations.open(entry.st_ino, os.O_RDONLY, CTX)
        mark = (mark_of_reads(entry.st_ino) + 2, 0, 0, 0)
        seen.clear()
        operations = servers.next(suspects=[mark])
        cleared = servers.line.cleared
        await operations.read(info.fh, 2 * PAGE, PAGE)
        assert seen == [{mark}] * (2 if waits else 1)
        assert not servers.mount.board.in_hand() and cleared == [mark]
        await operations.read(info.fh, 2 * PAGE, PAGE)
        assert cleared == [mark]

    trio.run(main)
