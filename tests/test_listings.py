"""What open directories are read from is kept once, and bounded."""

from __future__ import annotations

import errno
import gc

import pytest

from diffmergefs.serving.listings import Listings

NAMES = (b"a" * 100, b"b" * 100)
SIZE = 2 * 148


def test_who_opens_the_same_directory_shares_its_listing() -> None:
    listings = Listings(SIZE)
    first = listings.shared("folder", NAMES)
    assert first.names == NAMES
    again = [listings.shared("folder", tuple(bytes(name) for name in NAMES)) for _ in range(1000)]
    assert all(listing is first for listing in again)


def test_all_of_them_together_have_a_limit_and_a_first_one_none() -> None:
    listings = Listings(SIZE)
    held = listings.shared("folder", NAMES * 100)
    for folder, names in (("other", NAMES), ("folder", NAMES)):
        with pytest.raises(OSError) as caught:
            listings.shared(folder, names)
        assert caught.value.errno == errno.ENFILE
    assert listings.shared("folder", NAMES * 100) is held
    del held, caught
    gc.collect()
    held = listings.shared("folder", NAMES[:1])
    more = listings.shared("folder", NAMES[1:])  # it changed while it is read
    with pytest.raises(OSError) as again:
        listings.shared("folder", NAMES[:1])
    del held, again
    gc.collect()
    assert listings.shared("folder", NAMES[:1]).names == NAMES[:1] != more.names
