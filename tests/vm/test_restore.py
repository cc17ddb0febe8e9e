"""A VM's snapshots, shown by the mount, and the VM restored from it."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffmergefs.prefetch import record
from tests.support import inputs, mounts
from tests.support.live import until
from tests.vm import qemu
from tests.vm.chain import PAGE, TICK, Snapshot, VmChain, ask_sums, build_chain
from tests.vm.guest import GuestUnavailableError

pytestmark = pytest.mark.timeout(240)

_MIB = 1 << 20
_SHOWN_SECONDS = 30
# A guest that wiped pages may look like that: one healthy diff in some hundred (see the contract).
# Here the bytes count; test_filled has the hints.
_HINT = ("looks as if holes were filled",)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VmChain]:
    directory = tmp_path_factory.mktemp("vm")
    try:
        yield build_chain(directory)
    except GuestUnavailableError as error:
        pytest.skip(str(error))
    finally:
        shutil.rmtree(directory)  # pytest would keep three runs of half a gigabyte


@pytest.fixture(scope="module")
def mount(chain: VmChain, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The store of the chain, mounted with `--open-rw`; its last image is there."""
    point = tmp_path_factory.mktemp("mount")
    with mounts.mounted(chain.store, point, "--open-rw", expect_log=_HINT):
        # Files that changed a moment ago are not shown yet.
        deadline = time.monotonic() + _SHOWN_SECONDS
        while not shown(point, chain.snapshots[-1].layer).exists():
            assert time.monotonic() < deadline, f"no image in {sorted(point.rglob('*'))}"
            time.sleep(0.1)
        yield point


def test_the_layers_make_up_each_ram_file(chain: VmChain) -> None:
    image = bytearray(qemu.RAM_SIZE)
    for snapshot in chain.snapshots:
        overlay(image, snapshot.layer)
        assert first_difference(image, snapshot.ram.read_bytes()) is None


def test_the_diffs_are_sparse_and_hold_pages_that_became_zero(chain: VmChain) -> None:
    wiped = [bytes(size) + b"\xaa" * (_MIB - size) for size in (0, _MIB // 2, _MIB)]
    sums = [snapshot.sums["pattern"] for snapshot in chain.snapshots]
    assert sums == [hashlib.sha256(content).hexdigest() for content in wiped]
    for snapshot in chain.snapshots[1:]:
        # The half of the pattern that the guest has just wiped, at least.
        assert snapshot.zeroed >= _MIB // 2 // PAGE
        assert snapshot.layer.stat().st_blocks * 512 < qemu.RAM_SIZE // 4


def test_the_vm_restores_from_its_own_ram_file(chain: VmChain) -> None:
    last = chain.snapshots[-1]
    with inputs.unchanged([last.ram, last.state]):
        assert_restores(chain, last, last.ram, last.state)


def test_mounted_images_are_the_ram_files(chain: VmChain, mount: Path) -> None:
    for snapshot in chain.snapshots:
        image = shown(mount, snapshot.layer).read_bytes()
        assert first_difference(image, snapshot.ram.read_bytes()) is None


def test_the_vm_restores_from_the_mount(chain: VmChain, mount: Path) -> None:
    last = chain.snapshots[-1]
    with inputs.unchanged(chain.store.iterdir()):
        assert_restores(chain, last, shown(mount, last.layer), shown(mount, last.state))
    image = shown(mount, last.layer).read_bytes()
    assert first_difference(image, last.ram.read_bytes()) is None


def test_a_restore_is_recorded_and_then_prefetched(
    chain: VmChain, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The real guest's touches count as a restore's, and what is pushed is right for it."""
    last, sets = chain.snapshots[-1], tmp_path_factory.mktemp("sets")
    options = ["--open-rw", f"--working-set-dir={sets}"]
    point = tmp_path_factory.mktemp("mount")
    recorded = mounts.mounted(chain.store, point, "--record", *options, expect_log=_HINT)
    with recorded as recording:
        assert_restores(chain, last, shown(point, last.layer), shown(point, last.state))
        until(lambda: "recorded the first touch" in recording.log(), "it was not recorded")
    (path,) = sets.iterdir()
    found = record.decode(path.read_bytes())
    assert 100 * PAGE < found.touched_bytes <= qemu.RAM_SIZE // 4
    with mounts.mounted(chain.store, point, *options, expect_log=_HINT) as prefetching:
        assert_restores(chain, last, shown(point, last.layer), shown(point, last.state))
        assert f"prefetched {found.touched_bytes} bytes" in prefetching.log()
        image = shown(point, last.layer).read_bytes()
        assert first_difference(image, last.ram.read_bytes()) is None


def assert_restores(chain: VmChain, snapshot: Snapshot, ram: Path, state: Path) -> None:
    """The VM goes on from `ram` and `state` where `snapshot` was taken, without a boot."""
    with qemu.restore(chain.guest, ram, state) as vm:
        vm.execute("cont")
        tick = vm.console.wait_for(TICK, 60)
        # The line that was under way at the snapshot may be lost.
        assert snapshot.tick < int(tick[1]) <= snapshot.tick + 2
        assert tick[2] == snapshot.nonce
        assert ask_sums(vm) == snapshot.sums
        booted = ("Linux version", "nonce drawn")
        assert not [line for line in vm.console.lines if any(word in line for word in booted)]


def shown(mount: Path, path: Path) -> Path:
    """Where the mount shows the store's file `path`: in the folder of its snapshot's tag."""
    return mount / path.stem.split("-", 1)[1] / path.name


def overlay(image: bytearray, layer: Path) -> None:
    """Put each data extent of the sparse file `layer` into `image`."""
    with layer.open("rb") as file:
        position = 0
        while position < len(image):
            try:
                start = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError:  # ENXIO: no data up to the end
                return
            position = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            image[start:position] = os.pread(file.fileno(), position - start, start)


def first_difference(left: bytes | bytearray, right: bytes) -> int | None:
    """The offset of the first page that differs; the length of `right` when the lengths differ."""
    # A plain `assert left == right` would have pytest explain 128 MiB.
    if len(left) != len(right):
        return len(right)
    pages = range(0, len(right), PAGE)
    return next((at for at in pages if left[at : at + PAGE] != right[at : at + PAGE]), None)
