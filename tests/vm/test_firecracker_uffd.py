"""Real Firecrackers restore from page servers, with pages of 4 KiB and of 2 MiB."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPException
from pathlib import Path

import pytest

from tests.conftest import public_directory
from tests.support import hugepages, skips
from tests.support.commands import succeed
from tests.support.pageservers import PageServer, serving
from tests.vm import firecracker, snapshots
from tests.vm.firecracker import Guest
from tests.vm.snapshots import Taken, chain_options
from tests.vm.test_firecracker import MEBIBYTES, Host

pytestmark = pytest.mark.timeout(240)

_UID = 1234
_HUGE_MEBIBYTES = 128


def made(folder: Path, directory: Path, mebibytes: int, *, huge: bool) -> Host:
    """A chain that a guest of this size was taken in."""
    kernel = firecracker.make_kernel(directory / "vmlinux")
    guest = snapshots.boot(folder, directory, kernel, mebibytes, huge=huge)
    try:
        taken = snapshots.take_chain(guest, directory / "store", truth=False)
    finally:
        guest.end()
    return Host(folder, directory, taken)


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    folder = firecracker.programs()
    with public_directory() as directory:
        yield made(folder, directory, MEBIBYTES, huge=False)


@contextmanager
def restored(host: Host, taken: Taken, socket: Path, *, tracks: bool = False) -> Iterator[Guest]:
    """A Firecracker that has restored a snapshot from a page server."""
    guest = firecracker.start(host.folder, host.directory, f"vm{next(host.numbers)}")
    try:
        guest.load(taken.state, socket, tracks=tracks, kind="Uffd")
        yield guest
    finally:
        guest.end()


@contextmanager
def running(host: Host, taken: Taken, *options: str | Path) -> Iterator[tuple[Guest, PageServer]]:
    """A Firecracker that has restored a snapshot, from a page server with these options."""
    socket = host.directory / "socket"
    with serving(socket, *options) as server, restored(host, taken, socket, tracks=True) as guest:
        yield guest, server


def facts(server: PageServer) -> dict[str, int]:
    """What the server says that it has done."""
    found: dict[str, int] = json.loads(succeed("status", "--json", server.socket))
    return found


def arguments(taken: Sequence[Taken], *more: str) -> list[str]:
    return [*chain_options(taken), *more]


def test_firecracker_restores_every_tag_of_the_store(host: Host) -> None:
    for taken in host.taken:
        with running(host, taken, taken.memory.parent) as (guest, _):
            assert guest.state() == taken.answers


def test_firecrackers_restore_from_a_directory_of_sockets(host: Host) -> None:
    place = host.directory / "sockets"
    place.mkdir()
    with serving(place, host.store, at="--socket-dir") as server, ExitStack() as stack:
        for taken in host.taken:
            socket = place / f"{taken.tag}.sock"
            guest = stack.enter_context(restored(host, taken, socket))
            assert guest.state() == taken.answers
        assert facts(server)["accepted"] == len(host.taken)


def test_several_firecrackers_are_served_at_once(host: Host) -> None:
    last = host.taken[-1]
    with serving(host.directory / "socket", *arguments(host.taken)) as server, ExitStack() as stack:
        first, *others = [
            stack.enter_context(restored(host, last, server.socket)) for _ in range(3)
        ]
        assert first.state() == last.answers
        first.work("dz")
        assert first.state() != last.answers
        for other in others:
            assert other.state() == last.answers
        assert facts(server)["accepted"] == 3


def test_a_restore_is_recorded_and_then_copied_ahead(host: Host) -> None:
    last, sets = host.taken[-1], f"--working-set-dir={host.directory / 'sets'}"
    with serving(host.directory / "socket", *arguments(host.taken, sets, "--record")) as server:
        with restored(host, last, server.socket) as guest:
            assert guest.state() == last.answers
            faults = facts(server)["faults"]
        server.wait_for("recorded the first touch of")
    with running(host, last, *arguments(host.taken, sets)) as (guest, server):
        assert guest.state() == last.answers
        assert facts(server)["prefetched_bytes"] > 0
        assert facts(server)["faults"] < faults / 4


def test_a_diff_of_a_restored_vm_goes_on_top(host: Host) -> None:
    last = host.taken[-1]
    with running(host, last, last.memory.parent) as (guest, _):
        guest.work("zd")
        further = snapshots.take(guest, host.store, "further", last.tag, truth=False)
    assert further.memory.stat().st_blocks * 512 < MEBIBYTES << 18
    with running(host, further, further.memory.parent) as (guest, _):
        assert guest.state() == further.answers != last.answers


def test_a_state_of_another_size_is_refused(host: Host) -> None:
    """Firecracker tells the regions of the VM, and they are no image of that size."""
    other = host.directory / "other"
    other.write_bytes(b"\1" * (MEBIBYTES << 19))
    log = "the regions have 268435456 bytes, and the image has 134217728"
    options = [f"--base={other}"]
    with serving(host.directory / "socket", *options, expect_log=(log,)) as server:
        guest = firecracker.start(host.folder, host.directory, f"vm{next(host.numbers)}")

        def load() -> None:
            with suppress(OSError, HTTPException):  # it waits for its memory until it is killed
                guest.load(host.taken[0].state, server.socket, kind="Uffd")

        loading = threading.Thread(target=load)
        try:
            loading.start()
            server.wait_for(log)
        finally:
            guest.end()
            loading.join()
        assert facts(server)["refused"] == 1


def test_a_jailed_firecracker_finds_the_socket_in_its_jail(host: Host) -> None:
    last, name = host.taken[-1], f"vm{next(host.numbers)}"
    root = host.directory / "jailer" / "firecracker" / name / "root"
    root.mkdir(parents=True)
    root.chmod(0o755)
    owner = f"--socket-owner={_UID}:{_UID}"
    with serving(root / "uffd.sock", *arguments(host.taken, owner)) as server:
        command = f"jailer --id {name} --uid {_UID} --gid {_UID} --chroot-base-dir ../jailer"
        command += f" --exec-file {host.folder / 'firecracker'} -- --api-sock /api.sock"
        guest = Guest(command, host.store, str(host.folder), root / "api.sock")
        try:
            guest.wait_for_socket(root / "api.sock")
            (root / "state").write_bytes(last.state.read_bytes())
            (root / "state").chmod(0o644)
            guest.load("/state", "/uffd.sock", kind="Uffd")
            assert guest.uid() == _UID
            assert guest.state() == last.answers
            assert f"of user {_UID}: connected" in server.log()
        finally:
            guest.end()


def test_firecracker_restores_huge_pages_which_no_file_can_give_it() -> None:
    skips.require_root()
    folder = firecracker.programs()
    with hugepages.reserved(_HUGE_MEBIBYTES + 8), public_directory() as directory:
        host = made(folder, directory, _HUGE_MEBIBYTES, huge=True)
        for taken in host.taken:
            with running(host, taken, taken.memory.parent) as (guest, server):
                assert guest.state() == taken.answers
                assert 0 < facts(server)["faults"] <= _HUGE_MEBIBYTES // 2
