"""A mount of forkd's snapshots."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.support.images import overlay_oracle
from tests.support.live import until
from tests.support.mounts import mounted
from tests.support.stores import BASE_PAGES, SIZE, pages, write_chain, write_document, write_tag


def undocumented(store: Path, tag: str = "late", numbers: Iterable[int] = (3,)) -> Path:
    folder = write_tag(store, tag, layer=5, numbers=numbers)
    (folder / "snapshot.json").unlink()
    return folder


def test_a_document_that_comes_late_makes_a_diff_of_it_and_never_a_base(
    public_path: Path, mountpoint: Path
) -> None:
    store = write_chain(public_path / "s", ["base"])
    write_tag(store, "late", "base", layer=5, numbers=[3])
    document = (store / "late" / "snapshot.json").rename(public_path / "document")
    memory = mountpoint / "late" / "memory.bin"
    with mounted(store, mountpoint, expect_log=("has holes, and without a",)):
        assert "late" in os.listdir(mountpoint)  # old enough for the first look
        assert "memory.bin" not in os.listdir(mountpoint / "late")
        with pytest.raises(OSError):
            memory.read_bytes()
        document.rename(store / "late" / "snapshot.json")
        seen = until(lambda: content(memory), "never shown")
        assert seen == overlay_oracle(SIZE, [pages(0, BASE_PAGES), pages(5, [3])])


def test_a_document_that_calls_it_a_base_lifts_the_refusal_of_a_mount(
    public_path: Path, mountpoint: Path
) -> None:
    store = public_path / "s"
    undocumented(store)
    memory = mountpoint / "late" / "memory.bin"
    with mounted(store, mountpoint, expect_log=("has holes, and without a",)):
        assert content(memory) is None
        write_document(store, "late", '{"memory": "memory.bin"}')
        seen = until(lambda: content(memory), "never shown")
        assert seen == overlay_oracle(SIZE, [pages(5, [3])])


def content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
