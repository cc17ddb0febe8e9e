"""Real guests' diffs give no hint of filled holes, whatever they wiped; the same ones harmed do."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from diffmergefs.core.layer import Layer
from diffmergefs.opening.images import open_chain
from tests.support.images import signed, store_mapped, write_layer
from tests.vm import qemu
from tests.vm.chain import PAGE, Snapshot, VmChain, build_chain
from tests.vm.guest import GuestUnavailableError

pytestmark = pytest.mark.timeout(240)

TAGS = ("boot", "idle", "work", "more", "free", "idle")


@pytest.fixture(scope="module", params=["", "init_on_free=1"], ids=["plain", "init_on_free"])
def chain(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VmChain]:
    directory = tmp_path_factory.mktemp("vm")
    try:
        yield build_chain(directory, TAGS, qemu.Machine(arguments=request.param))
    except GuestUnavailableError as error:
        pytest.skip(str(error))
    finally:
        shutil.rmtree(directory)  # pytest would keep three runs of a gigabyte


def pages_of(path: Path) -> list[tuple[int, bytes]]:
    layer = Layer.open(str(path))
    offsets = [o for start, stop in layer.extents for o in range(start, stop, PAGE)]
    with path.open("rb") as file:
        return [(file.seek(o), file.read(PAGE)) for o in offsets]


def steps(chain: VmChain) -> list[tuple[Snapshot, Snapshot]]:
    return list(pairwise(chain.snapshots))


def test_a_healthy_guest_gives_no_hint(chain: VmChain) -> None:
    base, *diffs = [snapshot.layer for snapshot in chain.snapshots]
    assert open_chain(base, diffs).hints == ()
    for below, above in steps(chain):
        assert open_chain(below.ram, [above.layer]).hints == ()


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_its_diffs_written_through_a_mapping_give_one(
    chain: VmChain, kind: str, filesystem: Callable[[str], Path]
) -> None:
    for below, above in steps(chain):
        diff = write_layer(filesystem(kind) / "diff", qemu.RAM_SIZE, [])
        store_mapped(diff, pages_of(above.layer))
        (hint,) = open_chain(below.ram, [diff]).hints
        assert hint.path == str(diff) and "looks as if holes were filled" in hint.text
        diff.unlink()


def test_ten_pages_stored_through_a_mapping_later_give_one(
    chain: VmChain, filesystem: Callable[[str], Path]
) -> None:
    for below, above in steps(chain):
        diff = write_layer(filesystem("ext4") / "diff", qemu.RAM_SIZE, pages_of(above.layer))
        used = [offset for offset, _ in pages_of(below.ram)]
        later = random.Random(1).sample(used, 10)
        store_mapped(diff, [(offset, signed(2, offset, PAGE)) for offset in later])
        (hint,) = open_chain(below.ram, [diff]).hints
        assert hint.path == str(diff)
        diff.unlink()
