"""Which classes of users may reach a directory."""

from __future__ import annotations

from pathlib import Path

from diffmergefs.fuse.access import (
    LISTING,
    Access,
    reachable,
)
from tests.support.users import NOBODY, STRANGER


def test_nothing_above_keeps_every_class(public_path: Path) -> None:
    assert reachable([], 0, 0) == 0o777


def test_a_listing_is_for_those_who_may_list_and_search_every_directory() -> None:
    searched = Access(0, 0, 0o751)
    assert reachable([searched], 0, 0) == 0o777
    assert reachable([searched], 0, 0, LISTING) == 0o770
    assert reachable([Access(NOBODY, 0, 0o755)], STRANGER, 0, LISTING) == 0o777
    assert reachable([Access(NOBODY, NOBODY, 0o700)], STRANGER, 0, LISTING) == 0
