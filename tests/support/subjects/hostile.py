"""A store with a file that is no regular file, and how that is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffmergefs.core.errors import BrokenChainError
from diffmergefs.stores.catalog import read_catalog
from tests.support.stores import write_tag


def problem(store: Path, tag: str = "base") -> str:
    catalog = read_catalog(str(store))
    with pytest.raises(BrokenChainError) as caught:
        catalog.chain(tag)
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and len(text) < 10_000
    assert catalog.chain("fine")[-1].tag == "fine"  # never the whole directory
    return text


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_tag(tmp_path, "fine")
    write_tag(tmp_path, "base")
    return tmp_path
