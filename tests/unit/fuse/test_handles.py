"""Handles of the same directory or document share its content, and all contents are bounded."""

from __future__ import annotations

import errno
import gc

import pytest

from diffmergefs.fuse.handles import Contents

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
