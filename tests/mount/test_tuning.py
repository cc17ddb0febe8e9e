"""What the kernel is asked for a mount, and what is said where it is not permitted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffmergefs.system import tuning
from tests.support.mounts import mounted, require_fusectl
from tests.support.stores import write_chain


@pytest.mark.parametrize(
    ("options", "readahead", "background"),
    [
        ((), 128, 64),
        (("--readahead", "1024", "--max-background", "30"), 1024, 30),
        (("-o", "readahead=512K,max_background=9"), 512, 9),
        (("--record",), 4, 64),
    ],
    ids=str,
)
def test_a_mount_has_it_before_it_is_ready(
    options: tuple[str, ...], readahead: int, background: int, public_path: Path, mountpoint: Path
) -> None:
    store = write_chain(public_path / "store", ["base", "leaf"])
    require_fusectl()
    with mounted(store, mountpoint, *options):
        number = os.stat(mountpoint).st_dev
        found = Path(f"/sys/class/bdi/0:{number}/read_ahead_kb").read_text()
        assert int(found) == readahead
        connection = Path(tuning.CONNECTIONS, str(number))
        assert int((connection / "max_background").read_text()) == background
        assert int((connection / "congestion_threshold").read_text()) == background * 3 // 4


def test_a_recording_mount_with_another_readahead_warns(
    public_path: Path, mountpoint: Path
) -> None:
    store = write_chain(public_path / "store", ["base", "leaf"])
    with mounted(
        store, mountpoint, "--record", "--readahead=64", expect_log=("reads ahead 64 KiB, not 4",)
    ) as mount:
        assert "reads ahead 64 KiB, not 4" in mount.log()
