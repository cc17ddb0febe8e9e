"""Huge pages of 2 MiB, reserved for a test and given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import skips

_NUMBER = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")


@contextmanager
def reserved(count: int) -> Iterator[None]:
    """So many huge pages more than there are; skips the test where they cannot be had."""
    skips.require_root()
    if not _NUMBER.exists():
        pytest.skip(skips.NO_HUGE_PAGES)
    before = int(_NUMBER.read_text())
    try:
        _NUMBER.write_text(str(before + count))
        if int(_NUMBER.read_text()) < before + count:
            pytest.skip(skips.NO_HUGE_PAGES)
        yield
    finally:
        _NUMBER.write_text(str(before))
