"""Guests run on from a view whose server is killed again and again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import public_directory
from tests.support import mounts
from tests.support.live import until
from tests.support.pagecache import evict
from tests.support.servers import TOOK_OVER, killing
from tests.vm import firecracker, qemu, snapshots
from tests.vm.chain import TICK, VmChain, ask_sums, build_chain
from tests.vm.guest import GuestUnavailableError

pytestmark = pytest.mark.timeout(240)

KILLS = 20
MEBIBYTES = 128


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[VmChain]:
    directory = tmp_path / "vm"
    directory.mkdir()
    try:
        yield build_chain(directory, ("boot", "work"))
    except GuestUnavailableError as error:
        pytest.skip(str(error))
    finally:
        shutil.rmtree(directory)  # pytest would keep three runs of half a gigabyte


def test_qemus_guest(chain: VmChain, tmp_path: Path) -> None:
    """It goes on where it was, and all of its files are right, at each of 20 kills."""
    last, point = chain.snapshots[-1], tmp_path / "mount"
    point.mkdir()
    expected = TOOK_OVER, "looks as if holes were filled"
    with mounts.mounted(chain.store, point, "--open-rw", expect_log=expected) as mount:
        folder = point / "work"
        ram, state = folder / last.layer.name, folder / last.state.name
        until(ram.exists, "the image is not shown")
        with killing(mount, 0.3) as killed, qemu.restore(chain.guest, ram, state) as vm:
            vm.execute("cont")
            tick = vm.console.wait_for(TICK, 60)
            assert (int(tick[1]) > last.tick, tick[2]) == (True, last.nonce)
            while len(killed) < KILLS:
                assert ask_sums(vm) == last.sums
            assert vm.console.wait_for(TICK, 60)[2] == last.nonce
            assert not [line for line in vm.console.lines if "Linux version" in line]
        assert ram.read_bytes() == last.ram.read_bytes()


def test_firecrackers_guests() -> None:
    """Each sums its memory while it is brought; one that read zeros would run on with another."""
    folder = firecracker.programs()
    with public_directory() as directory:
        kernel = firecracker.make_kernel(directory / "vmlinux")
        guest = snapshots.boot(folder, directory, kernel, MEBIBYTES)
        try:
            taken = snapshots.take_chain(guest, directory / "store", truth=False)
        finally:
            guest.end()
        point = directory / "view"
        point.mkdir()
        with mounts.mounted(directory / "store", point, expect_log=(TOOK_OVER,)) as mount:
            last = taken[-1]
            image = point / last.tag / "memory.bin"
            until(image.exists, "the image is not shown")
            fd, number = os.open(image, os.O_RDONLY), 0
            try:
                with killing(mount, 0.1) as killed:
                    while len(killed) < KILLS:
                        evict(fd)
                        number += 1
                        guest = firecracker.start(folder, directory, f"vm{number}")
                        try:
                            guest.load(last.state, image)
                            assert guest.state() == last.answers
                        finally:
                            guest.end()
            finally:
                os.close(fd)
