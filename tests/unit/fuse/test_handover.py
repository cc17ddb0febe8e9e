"""What a server knew is known by the next one, which serves the same bytes or an error."""

from __future__ import annotations

import errno
import gc
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmergefs.core import sparse
from diffmergefs.core import view as views
from diffmergefs.core.errors import LayerChangedError
from diffmergefs.core.layer import Layer
from diffmergefs.fuse.access import Access
from diffmergefs.fuse.arena import Arena, Place
from diffmergefs.fuse.handles import Handle
from diffmergefs.fuse.journal import Journal
from diffmergefs.fuse.nodes import Document, MemoryFile, OpenImage, Passed, Root, TagFolder
from diffmergefs.opening.images import open_chain
from tests.support.images import PAGE, overlay_oracle, write_layer
from tests.support.layers import keep_times, poke
from tests.support.logged import warnings
from tests.support.stores import BASE_PAGES, SIZE, age, pages, write_tag
from tests.support.subjects.handover import Mount, Server
from tests.support.subjects.served import root

__all__ = ["root"]

LEAF = overlay_oracle(SIZE, [pages(0, BASE_PAGES), pages(1, [1]), pages(2, [2])])
FOLDER, TEXT = TagFolder("leaf", 1, 2), Document("leaf", 5, b"d" * 32, 1, 3)


@pytest.fixture(autouse=True)
def log_seen_by_caplog(monkeypatch: pytest.MonkeyPatch) -> None:
    # A test that ran the command line in this process turned it off.
    monkeypatch.setattr(logging.getLogger("diffmergefs"), "propagate", True)


@pytest.fixture
def mount(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mount]:
    found = Mount(root, monkeypatch)
    yield found
    found.close()


def replace_memory(root: Path, tag: str) -> None:
    write_layer(root / tag / "new", SIZE, pages(9, [9])).rename(root / tag / "memory.bin")
    age(root / tag / "memory.bin")


# Numbers


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("look up"), st.integers(0, 3)),
            st.tuples(st.just("forget"), st.integers(0, 3)),
            st.just(("die", 0)),
        ),
        max_size=25,
    )
)
def test_numbers_and_lookups_are_those_of_the_server_before(steps: list[tuple[str, int]]) -> None:
    nodes = [TagFolder(str(n), n, n) for n in range(4)]
    lookups: Counter[int] = Counter()
    known: dict[int, int] = {}
    used: set[int] = set()
    with pytest.MonkeyPatch.context() as patch:
        mount = Mount(None, patch)
        server = mount.server()
        for step, n in [*steps, ("die", 0)]:
            if step == "die":
                server = mount.server()
                found = {
                    server.inodes.number(node): count for _, node, count in server.inodes.known()
                }
                assert found == lookups
            elif step == "look up":
                number = server.inodes.number(nodes[n])
                assert known.get(n) == number or number not in used
                known[n] = number
                used.add(number)
                server.inodes.look_up(number)
                lookups[number] += 1
            elif n in known and lookups[known[n]]:
                server.inodes.forget(known[n], 1)
                lookups[known[n]] -= 1
                if not lookups[known[n]]:
                    del lookups[known.pop(n)]


def test_the_numbers_of_handles_are_never_used_again(mount: Mount) -> None:
    used = []
    for _ in range(3):
        server = mount.server()
        used += [server.handles.add_folder(FOLDER, (b"a",)) for _ in range(3)]
        server.close(used[-1])
    assert len(set(used)) == 9
    assert set(server.handles.by_number) == {*used} - {used[2], used[5], used[8]}


def test_a_handle_that_is_closed_stays_closed(mount: Mount) -> None:
    first = mount.server()
    one, two = (first.open("leaf") for _ in range(2))
    first.close(one)
    assert list(mount.server().handles.by_number) == [two]


# Images


@pytest.mark.parametrize("generations", [1, 3])
def test_an_open_image_has_the_same_bytes_though_its_files_are_gone(
    generations: int, mount: Mount, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = mount.server()
    handle = server.open("leaf")
    image = server.handles.by_number[handle].image
    assert image is not None
    number = server.inodes.number(MemoryFile(image))
    known = [known_of(layer) for layer in image.view.layers]
    shutil.rmtree(root)

    def fails(*_: object) -> None:
        raise AssertionError("a takeover neither walks nor merges")

    monkeypatch.setattr(views, "SegmentMap", fails)
    with monkeypatch.context() as patch:
        patch.setattr(sparse, "walk", fails)
        for _ in range(generations):
            server = mount.server()
    found = server.inodes.node(number)
    assert isinstance(found, MemoryFile) and found.image is server.handles.by_number[handle].image
    for name in ("name", "access", "visible", "mtime_ns", "tag"):
        assert getattr(found.image, name) == getattr(image, name)
    for xattr in OpenImage.XATTRS:
        assert found.image.xattr("/", xattr) == image.xattr("/", xattr)
    assert [known_of(layer) for layer in found.image.view.layers] == known
    assert server.read(handle) == LEAF


def known_of(layer: Layer) -> object:
    return layer.facts, [list(extents) for extents in layer.all_extents]


def test_an_image_that_is_served_is_served_on_under_its_number(mount: Mount) -> None:
    first = mount.server()
    handle = first.open("leaf")
    known = first.handles.by_number[handle].image
    assert known is not None
    second = mount.server()
    assert second.store is not None
    image = second.store.open("leaf")
    assert image is second.handles.by_number[handle].image
    assert second.inodes.number(MemoryFile(image)) == first.inodes.number(MemoryFile(known))


def test_an_image_whose_chain_changed_is_read_on_and_not_served(mount: Mount, root: Path) -> None:
    first = mount.server()
    assert first.store is not None
    handle = first.open("leaf")
    replace_memory(root, "leaf")
    first.store.look()
    first.store.look()
    second = mount.server()
    assert second.store is not None
    assert second.store.opened("leaf") is None
    assert second.read(handle) == LEAF
    new = overlay_oracle(SIZE, [pages(0, BASE_PAGES), pages(1, [1]), pages(9, [9])])
    assert second.read(second.open("leaf")) == new


def test_images_share_layers_in_the_successor_too(mount: Mount) -> None:
    first = mount.server()
    handles = [first.open(tag) for tag in ("leaf", "work", "leaf")]
    second = mount.server()
    leaf, work, again = (second.handles.by_number[handle].image for handle in handles)
    assert leaf is not None and work is not None
    assert leaf is again and leaf is not work
    assert leaf.view.layers[:2] == work.view.layers
    with_lookups = {
        node.image for _, node, _ in second.inodes.known() if isinstance(node, MemoryFile)
    }
    assert with_lookups == {leaf, work}


@pytest.mark.parametrize("by", [1, 2])
def test_what_one_server_found_changed_is_changed_for_all(
    by: int, mount: Mount, root: Path
) -> None:
    path = root / "work" / "memory.bin"
    handle = (server := mount.server()).open("leaf")
    if by == 2:
        server = mount.server()
    before = path.stat()
    poke(path, PAGE, b"x")
    with pytest.raises(LayerChangedError):
        server.read(handle)
    keep_times(path, lambda: poke(path, PAGE, b"x"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    for _ in range(2):
        server = mount.server()
        image = server.handles.by_number[handle].image
        assert image is not None
        assert image.view.layers[1].tainted is not None
        with pytest.raises(LayerChangedError):
            server.read(handle)


@pytest.mark.parametrize("is_changed", [False, True])
def test_all_servers_have_an_image_that_the_keeper_opened(
    is_changed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_layer(tmp_path / "base", SIZE, pages(0, BASE_PAGES))
    diff = write_layer(tmp_path / "diff", SIZE, pages(1, [1]))
    image = OpenImage.of(open_chain(base, [diff]).view, "memory", Access(0, 0, 0o400))
    mount = Mount(None, monkeypatch, image)
    handle = mount.server().open_image(image)
    assert not mount.kept
    if is_changed:
        with pytest.raises(LayerChangedError):
            image.view.layers[1]._taint("on purpose")
        image.view.layers[1].tainted = None  # as it is in the keeper
    for _ in range(2):
        server = mount.server()
        assert server.handles.by_number[handle].image is image
        assert (image.view.layers[1].tainted == "on purpose") == is_changed
        number = server.inodes.number(MemoryFile(image))
        assert (number, MemoryFile(image), 1) in list(server.inodes.known())


# Other files and directories


def test_texts_and_listings_are_read_on(mount: Mount) -> None:
    first = mount.server()
    listing = [first.handles.add_folder(FOLDER, (b"a", b"b")) for _ in range(2)]
    later = first.handles.add_folder(FOLDER, (b"a", b"c"))
    text = first.handles.add_text(TEXT, b"text")
    for _ in range(2):
        by_number = mount.server().handles.by_number
        assert by_number[listing[0]].names is by_number[listing[1]].names
        one, two, other = (by_number[handle] for handle in (listing[0], later, text))
        assert one.names is not None and one.names.parts == (b"a", b"b")
        assert two.names is not None and two.names.parts == (b"a", b"c")
        assert other.text is not None and other.text.parts == (b"text",)
        assert (one.node, other.node, one.text, other.names) == (FOLDER, TEXT, None, None)


def test_what_was_closed_takes_no_room_of_what_is_open(mount: Mount) -> None:
    """All contents have a common limit."""
    first = mount.server()
    large = b"x" * (40 << 20)
    first.close(first.handles.add_text(TEXT, large))
    gc.collect()
    handle = first.handles.add_text(TEXT, large + b"y")
    text = mount.server().handles.by_number[handle].text
    assert text is not None and text.parts == (large + b"y",)


def passed(server: Server, name: str) -> tuple[Passed, int]:
    tree = server.tree
    node = tree.child(tree.child(Root(), "leaf"), name)
    assert isinstance(node, Passed)
    return node, server.handles.add(Handle.of_file(tree.passthrough, node))


@pytest.mark.parametrize("generations", [1, 2])
def test_a_file_that_is_passed_through_is_read_on_though_it_is_gone(
    generations: int, mount: Mount, root: Path
) -> None:
    server = mount.server()
    (root / "leaf" / "note").write_bytes(b"a note")
    node, note = passed(server, "note")
    _, state = passed(server, "vmstate")
    for name in ("note", "vmstate"):
        (root / "leaf" / name).rename(root / name)
    (root / "note").unlink()
    for _ in range(generations):
        server = mount.server()
    found = server.handles.by_number[note]
    assert (found.read_file(2, 100), found.node, found.device) == (b"note", node, node.device)
    state_handle = server.handles.by_number[state]
    assert state_handle.read_file(0, 5) == b"state"
    (root / "vmstate").write_bytes(b"overwritten")
    with pytest.raises(OSError) as caught:
        state_handle.read_file(0, 5)
    assert caught.value.errno == errno.EIO


# SOURCE


def test_a_successor_goes_on_from_the_last_look(mount: Mount, root: Path) -> None:
    first = mount.server()
    assert first.store is not None
    shutil.rmtree(root / "leaf")
    write_tag(root, "new", "base", layer=3)
    first.store.look()
    assert set(first.store.tags()) == {"base", "work", "new"}
    second = mount.server()
    assert second.store is not None
    assert set(second.store.tags()) == {"base", "work", "new"}
    assert second.store.chain("new") is not None
    shutil.rmtree(root / "new")
    second.store.look()
    third = mount.server()
    assert third.store is not None
    assert set(third.store.tags()) == {"base", "work"}


def test_a_successor_serves_the_directory_that_the_one_before_turned_to(
    mount: Mount, root: Path
) -> None:
    first = mount.server()
    assert first.store is not None
    root.rename(root.with_name("old"))
    write_tag(root, "other")
    first.store.look()
    for _ in range(2):
        server = mount.server()
        assert server.store is not None
        assert os.path.samestat(os.fstat(server.store.fd), root.stat())
        assert server.store.tags() == ["other"]
        assert len(server.read(server.open("other"))) == SIZE


def test_the_kernel_is_tuned_once(mount: Mount) -> None:
    first = mount.server()
    assert first.handover.readahead is None
    first.handover.tuned(1024)
    for _ in range(2):
        server = mount.server()
        assert server.handover.readahead == 1024
    server.handover.tuned(None)
    assert mount.server().handover.readahead == 0


# What a kill may leave


@pytest.fixture
def futures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several servers may follow the same one: none gives memory back."""
    monkeypatch.setattr(Arena, "free_all_but", lambda *_: None)


def busy(mount: Mount, root: Path) -> list[int]:
    """A server that has done a bit of everything; its handles of leaf."""
    server = mount.server()
    assert server.store is not None
    handles = [server.open("leaf"), server.open("work"), server.open("leaf")]
    server.close(handles.pop(1))
    passed(server, "vmstate")
    server.handles.add_folder(FOLDER, (b"a", b"b"))
    server.handles.add_text(TEXT, b"text")
    number = server.inodes.number(FOLDER)
    for _ in range(3):
        server.inodes.look_up(number)
    server.inodes.forget(number, 1)
    write_tag(root, "new", "base", layer=3)
    server.store.look()
    server.close(server.open("new"))
    shutil.rmtree(root / "new")
    server.store.look()
    server.handover.tuned(128)
    gc.collect()
    server.tend()
    return handles


def knows(server: Server) -> object:
    by_number = server.handles.by_number
    return (
        {number: lookups for number, _, lookups in server.inodes.known()},
        server.inodes.fresh,
        {n: (h.image and h.image.tag, h.node, h.key, h.fd is None) for n, h in by_number.items()},
        server.handover.readahead,
        server.store and server.store.tags(),
    )


@pytest.mark.usefixtures("futures")
def test_records_that_are_applied_twice_do_no_harm(mount: Mount, root: Path) -> None:
    handles = busy(mount, root)
    records = list(mount.journal.read())
    kept = mount.copy()
    once = mount.server()
    mount.journal.begin(lambda: [record for record in records for _ in range(2)])
    twice = mount.server(kept)
    assert knows(twice) == knows(once)
    assert [twice.read(handle) for handle in handles] == [LEAF] * 2


@pytest.mark.usefixtures("futures")
def test_whatever_the_last_record_is_the_next_server_serves_what_is_recorded(
    mount: Mount, root: Path
) -> None:
    busy(mount, root)
    records = list(mount.journal.read())
    assert {kind for kind, *_ in records} == {
        *(
            "layer",
            "image",
            "lookups",
            "opened",
            "closed",
            "content",
            "look",
            "facts",
            "tuned",
            "fresh",
        ),
        "gone",
    }
    for count in range(len(records) + 1):
        mount.journal.begin(lambda count=count: records[:count])  # type: ignore[misc]
        server = mount.server(mount.copy())
        assert {*server.line.kept} <= {*mount.kept}
        for number, handle in server.handles.by_number.items():
            if handle.image is not None and handle.image.tag == "leaf":
                assert server.read(number) == LEAF


@pytest.mark.parametrize("how", ["gone", "cut short"])
@pytest.mark.usefixtures("futures")
def test_what_lost_its_descriptors_is_an_error_and_all_else_lives(
    how: str, mount: Mount, root: Path
) -> None:
    handles = busy(mount, root)
    records = list(mount.journal.read())
    lost = Counter[str]()
    for number in mount.kept:
        kept = mount.copy()
        kept[number].clear()
        if how == "gone":
            del kept[number]
        mount.journal.begin(lambda: records)
        server = mount.server(kept)
        for handle in handles:
            found = server.handles.by_number[handle]
            if found.view is None:
                lost["image"] += 1
                # With none of these, a read of it is EIO.
                assert (found.fd, found.text, found.names) == (None, None, None)
            else:
                assert server.read(handle) == LEAF
        lost["files"] += sum(
            h.fd is None for h in server.handles.by_number.values() if isinstance(h.node, Passed)
        )
    assert lost == {"image": 2 * 3, "files": 1}


@pytest.mark.parametrize("what", ["descriptors", "memory"])
def test_what_cannot_be_kept_is_served_and_lost_with_its_server(
    what: str, mount: Mount, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = mount.server()
    assert first.store is not None
    full = OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))

    def fails(thing: object) -> Place:
        raise full

    with monkeypatch.context() as patch:
        if what == "descriptors":
            first.line.fails = full
        else:
            patch.setattr(mount.arena, "put", fails)
        handle = first.open("leaf")
        _, state = passed(first, "vmstate")
        assert first.read(handle) == LEAF
        first.store.look()
    lost = ["leaf:", *(["the last look"] if what == "memory" else [])]
    reason = "would not outlive this server: No buffer space available"
    assert warnings(caplog) == [f"{name} {reason}" for name in lost]
    second = mount.server()
    assert second.handles.by_number[handle].view is None
    assert (second.handles.by_number[state].fd is None) == (what == "descriptors")
    assert second.read(second.open("leaf")) == LEAF


def test_a_new_source_that_cannot_be_held_is_lost_with_its_server(
    mount: Mount, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = mount.server()
    assert first.store is not None
    first.line.fails = OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
    root.rename(root.with_name("old"))
    write_tag(root, "other")
    first.store.look()
    text = "the new SOURCE would not outlive this server: No buffer space available"
    assert text in warnings(caplog)
    second = mount.server()
    assert second.store is not None
    second.store.look()
    assert second.store.tags() == ["other"], "a look finds it again"


# What is gone


def memory_of(mount: Mount) -> int:
    """How many pages are in use."""
    return os.fstat(mount.arena._fd).st_blocks // 8


def test_what_is_gone_is_dropped(mount: Mount, root: Path) -> None:
    server = mount.server()
    assert server.store is not None
    server.store.look()
    assert (len(mount.kept), memory_of(mount)) == (0, 1), "the look"
    handle = server.open("leaf")
    _, state = passed(server, "vmstate")
    assert len(mount.kept) == 4, "three layers, and a file"
    assert memory_of(mount) == 5, "their extents and the merge too"
    replace_memory(root, "base")
    server.store.look()
    server.close(state)
    server.tend()
    assert (len(mount.kept), memory_of(mount)) == (3, 5)
    server = mount.server()
    server.tend()
    assert (len(mount.kept), memory_of(mount)) == (3, 5) and server.read(handle) == LEAF
    server.wakes.clear()
    server.close(handle)
    gc.collect()
    assert server.wakes
    server.tend()
    assert (len(mount.kept), memory_of(mount)) == (0, 1)
    assert not any(kind in ("layer", "image") for kind, *_ in server.handover._records())


def test_what_nothing_refers_to_is_dropped_at_a_takeover(mount: Mount) -> None:
    server = mount.server()
    number = server.line.hold(0)
    assert number in mount.kept
    second = mount.server()
    assert number not in mount.kept
    with pytest.raises(OSError) as caught:
        os.fstat(second.line.held[number][0])
    assert caught.value.errno == errno.EBADF


def test_many_takeovers_leave_nothing_behind(mount: Mount, root: Path) -> None:
    busy(mount, root)
    mount.server().tend()
    kept = len(mount.kept)
    records, memory = len(list(mount.journal.read())), memory_of(mount)
    for _ in range(2):
        mount.server().tend()
        gc.collect()
        assert (len(mount.kept), len(list(mount.journal.read()))) == (kept, records)
        assert memory_of(mount) == memory


def test_a_long_journal_is_shortened(mount: Mount) -> None:
    server = mount.server()
    number = server.inodes.number(FOLDER)
    server.inodes.look_up(number)
    server.close(server.handles.add_text(TEXT, b"x" * (2 << 20)))
    assert mount.journal.is_long and server.wakes
    server.tend()
    assert not mount.journal.is_long and len(list(mount.journal.read())) < 10
    assert list(mount.server().inodes.known()) == [(number, FOLDER, 1)]


def test_tending_never_raises(
    mount: Mount, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = mount.server()

    def fails(records: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Journal, "is_long", True)
    monkeypatch.setattr(mount.journal, "begin", fails)
    server.tend()
    assert warnings(caplog) == ["tending the journal failed: this is a bug"]


def test_each_thing_is_recorded_before_its_answer(mount: Mount) -> None:
    """The journal has it when the call returns: nothing else tells the successor."""
    server = mount.server()
    steps: list[tuple[str, Callable[[], object]]] = [
        ("image", lambda: server.open("leaf")),
        ("lookups", lambda: server.inodes.look_up(server.inodes.number(FOLDER))),
        ("opened", lambda: server.handles.add_folder(FOLDER, ())),
        ("closed", lambda: server.handles.remove(max(server.handles.by_number))),
        ("tuned", lambda: server.handover.tuned(1)),
    ]
    for kind, step in steps:
        before = Counter(record[0] for record in mount.journal.read())
        step()
        after = Counter(record[0] for record in mount.journal.read())
        assert after[kind] == before[kind] + 1, kind
