"""A mount of numbered files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.images import overlay_oracle, write_layer
from tests.support.live import until
from tests.support.mounts import mounted
from tests.support.stores import BASE_PAGES, SIZE, age, pages, write_numbered


def content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


@pytest.mark.parametrize("option", [["--allow-gaps"], ["-o", "allow_gaps"], []])
def test_a_mount_shows_what_lies_above_a_gap_only_if_told(
    public_path: Path, mountpoint: Path, option: list[str]
) -> None:
    names = ["000-base.mem", "001-a.mem", "003-b.mem", "004-c.mem"]
    store = write_numbered(public_path / "s", names)
    with mounted(store, mountpoint, *option, expect_log=("1 layer is missing",)):
        shown = {"base", "a", "b", "c"} if option else {"base", "a"}
        assert set(os.listdir(mountpoint)) == shown
        if not option:
            age(write_layer(store / "002-x.mem", SIZE, pages(6, [6])))
            until(lambda: set(os.listdir(mountpoint)) == {"base", "a", "b", "c", "x"}, "not shown")
            layers = [pages(0, BASE_PAGES), pages(1, [1]), pages(6, [6]), pages(2, [2])]
            assert (mountpoint / "b/003-b.mem").read_bytes() == overlay_oracle(SIZE, layers)


def test_a_mount_of_diffs_without_their_base_shows_no_memory(
    public_path: Path, mountpoint: Path
) -> None:
    store = write_numbered(public_path / "s", ["000-base.mem", "001-a.mem", "002-b.mem"])
    base = (store / "000-base.mem").rename(public_path / "base")
    with mounted(store, mountpoint, expect_log=("1 layer is missing below it",)):
        for tag, name in (("a", "001-a.mem"), ("b", "002-b.mem")):
            assert name not in os.listdir(mountpoint / tag)
            with pytest.raises(OSError):
                (mountpoint / tag / name).read_bytes()
        base.rename(store / "000-base.mem")
        expected = overlay_oracle(SIZE, [pages(0, BASE_PAGES), pages(1, [1])])
        until(lambda: content(mountpoint / "a/001-a.mem") == expected, "not shown")
