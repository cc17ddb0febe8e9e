"""A real Firecracker with memory on both sides of the gap below 4 GiB."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import mounts
from tests.vm import firecracker, snapshots
from tests.vm.firecracker import ABOVE_GAP, GAP_SIZE, REGION_SIZE
from tests.vm.snapshots import chain_options, digest

pytestmark = pytest.mark.timeout(240)

_MIB = 1 << 20


def test_a_view_of_two_regions_is_the_guest(
    public_path: Path, soak: bool, seen: Callable[..., None]
) -> None:
    """A chain of a Full snapshot of 3.5 GiB and a Diff equals a Full one, and restores.

    Without --soak a small guest takes its place, which has one region.
    """
    folder = firecracker.programs()
    mebibytes, low, high = 256, 64 * _MIB, 128 * _MIB
    if soak:
        mebibytes, low, high = 3584, ABOVE_GAP - GAP_SIZE - REGION_SIZE // 2, ABOVE_GAP
    kernel = firecracker.make_kernel(public_path / "vmlinux", (low, high))
    store = public_path / "store"
    guest = snapshots.boot(folder, public_path, kernel, mebibytes)
    try:
        base = snapshots.take(guest, store, "base", None, truth=False)
        guest.work("dz")
        diff = snapshots.take(guest, store, "diff", "base", truth=True)
    finally:
        guest.end()
    assert base.memory.stat().st_size == diff.memory.stat().st_size == mebibytes * _MIB
    assert base.memory.stat().st_blocks * 512 >= mebibytes * _MIB
    written = diff.memory.stat().st_blocks * 512
    assert written < REGION_SIZE
    # Both halves of what the guest works on are in the diff: in the file there is no gap.
    with diff.memory.open("rb") as file:
        for at in (low, high - GAP_SIZE if soak else high):
            file.seek(at)
            assert any(file.read(REGION_SIZE // 2))
    point = public_path / "view"
    point.mkdir()
    with mounts.mounted(None, point, *chain_options([base, diff])):
        assert digest(point / "memory.bin") == diff.truth
        restored = firecracker.start(folder, public_path, "restored")
        try:
            restored.load(diff.state, point / "memory.bin")
            assert restored.state() == diff.answers != base.answers
        finally:
            restored.end()
    seen(MiB_of_memory=mebibytes, bytes_of_the_diff=written)
