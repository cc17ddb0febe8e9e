"""Numbers of handles, and the contents that they share, which are bounded."""

from __future__ import annotations

import errno
import gc

import pytest

from diffmergefs.fuse.handles import Contents, Handle, Handles
from diffmergefs.fuse.nodes import Passed, Root

NAMES = (b"a" * 100, b"b" * 100)
SIZE = 2 * 148


def test_handles_of_one_directory_share_its_listing() -> None:
    contents = Contents(SIZE)
    first = contents.shared("folder", *NAMES)
    assert first.parts == NAMES
    again = [contents.shared("folder", *tuple(bytes(name) for name in NAMES)) for _ in range(1000)]
    assert all(content is first for content in again)


def test_contents_have_a_common_limit_that_does_not_bind_the_first() -> None:
    contents = Contents(SIZE)
    held = contents.shared("folder", *NAMES * 100)
    for folder, names in (("other", NAMES), ("folder", NAMES)):
        with pytest.raises(OSError) as caught:
            contents.shared(folder, *names)
        assert caught.value.errno == errno.ENFILE
    assert contents.shared("folder", *NAMES * 100) is held
    del held, caught
    gc.collect()
    held = contents.shared("folder", *NAMES[:1])
    more = contents.shared("folder", *NAMES[1:])  # the directory changed while it is read
    with pytest.raises(OSError) as again:
        contents.shared("folder", *NAMES[:1])
    del held, again
    gc.collect()
    assert contents.shared("folder", *NAMES[:1]).parts == NAMES[:1] != more.parts


def test_numbers_count_on_from_where_they_begin() -> None:
    handles = Handles()
    first = handles.add(Handle())
    handles.begin_at(1000)
    numbers = [
        handles.add(Handle()),
        handles.add_text(Root(), b"x"),
        handles.add_folder(Root(), ()),
    ]
    assert (first, numbers) == (1, [1000, 1001, 1002])


def test_a_handle_is_removed_once() -> None:
    handles = Handles()
    handle = Handle()
    number = handles.add(handle)
    assert handles.remove(number) is handle
    assert handles.remove(number) is None and handles.remove(99) is None
    assert not handles.by_number
    assert handles.add(Handle()) > number


def test_what_is_added_and_removed_is_recorded() -> None:
    handles = Handles()
    records: list[tuple[int, Handle | None]] = []

    def record(number: int, handle: Handle | None) -> None:
        assert (number in handles.by_number) == (handle is not None)
        records.append((number, handle))

    handles.recorded = record
    text, folder = handles.add_text(Root(), b"x"), handles.add_folder(Root(), (b"a",))
    assert records == [(n, handles.by_number[n]) for n in (text, folder)]
    for _ in range(2):
        handles.remove(text)
    assert records[2:] == [(text, None)]


def test_one_descriptor_of_a_file_is_found_while_it_is_open() -> None:
    handles = Handles()
    node = Passed("a", 1, 2, 3)
    assert handles.descriptor_of(node) is None
    number = handles.add(Handle(fd=7, node=node))
    assert (handles.descriptor_of(node), handles.descriptor_of(Passed("b", 1, 2, 3))) == (7, None)
    handles.remove(number)
    assert handles.descriptor_of(node) is None


def test_a_handle_whose_content_was_lost_reads_from_nothing() -> None:
    handle = Handle(node=Passed("a", 5, 2, 3))
    assert (handle.view, handle.fd, handle.text, handle.names) == (None, None, None, None)
    assert handle.device == 5
