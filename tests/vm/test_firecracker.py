"""Real Firecrackers take a chain of snapshots apart, and restore from its views."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import public_directory
from tests.support import mounts, mounttable
from tests.support.commands import succeed
from tests.support.live import until
from tests.vm import firecracker, snapshots
from tests.vm.firecracker import Guest, RefusedError
from tests.vm.snapshots import Taken, chain_options, digest

pytestmark = pytest.mark.timeout(240)

MEBIBYTES = 256
_UID = 1234


@dataclass
class Host:
    """Where Firecrackers run, and what they run on."""

    folder: Path
    """Of Firecracker's programs."""
    directory: Path
    taken: tuple[Taken, ...]
    numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def store(self) -> Path:
        return self.directory / "store"

    @contextmanager
    def restored(self, taken: Taken, image: Path, *, tracks: bool = False) -> Iterator[Guest]:
        """A Firecracker that has restored a snapshot from a memory file."""
        guest = firecracker.start(self.folder, self.directory, f"vm{next(self.numbers)}")
        try:
            guest.load(taken.state, image, tracks=tracks)
            yield guest
        finally:
            guest.end()


@dataclass
class Jail:
    """A Firecracker in its jailer: a uid and a chroot of its own, and a directory bound there."""

    guest: Guest
    root: Path
    uid: int

    def save(self, kind: str, state: Path, memory: Path) -> None:
        """Have it write a snapshot into its chroot, and move the files to where they belong."""
        self.guest.save(kind, "/made.state", "/made.memory")
        shutil.move(self.root / "made.state", state)
        shutil.move(self.root / "made.memory", memory)


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """A chain of 256 MiB in a store that every user may read, as are all of its layers."""
    folder = firecracker.programs()
    with public_directory() as directory:
        kernel = firecracker.make_kernel(directory / "vmlinux")
        guest = snapshots.boot(folder, directory, kernel, MEBIBYTES)
        try:
            taken = snapshots.take_chain(guest, directory / "store", truth=True)
        finally:
            guest.end()
        yield Host(folder, directory, taken)


@contextmanager
def view(host: Host, kind: str, *options: str) -> Iterator[Callable[[str], Path]]:
    """The chain, mounted for every user as a 'store' or by 'explicit' files.

    Gives the memory file of a tag in it: of explicit files there is that of the last one only.
    """
    point = host.directory / f"view{next(host.numbers)}"
    point.mkdir(mode=0o755)
    if kind == "explicit":
        files = [*options, *chain_options(host.taken)]
        with mounts.mounted(None, point, "--allow-other", *files):
            yield lambda tag: point / "memory.bin"
        return
    with mounts.mounted(host.store, point, "--allow-other", *options):
        until((point / host.taken[-1].tag / "memory.bin").exists, "the last tag is not there")
        yield lambda tag: point / tag / "memory.bin"


KINDS = pytest.mark.parametrize("kind", ["store", "explicit"])


@contextmanager
def jailed(host: Host, image: Path, uid: int) -> Iterator[tuple[Jail, str]]:
    """A jailed Firecracker that sees the directory of `image`, and the path of the image in it."""
    name = f"vm{next(host.numbers)}"
    root = host.directory / "jailer" / "firecracker" / name / "root"
    (root / "view").mkdir(parents=True)
    with ExitStack() as stack:
        subprocess.run(["mount", "--bind", image.parent, root / "view"], check=True, timeout=60)
        stack.callback(mounttable.unmount, str(root / "view"))
        command = f"jailer --id {name} --uid {uid} --gid {uid} --chroot-base-dir ../jailer"
        command += (
            f" --exec-file {host.folder / 'firecracker'} -- --api-sock /api.sock --level Error"
        )
        guest = Guest(command, host.store, str(host.folder), root / "api.sock")
        stack.callback(guest.end)
        guest.wait_for_socket(root / "api.sock")
        yield Jail(guest, root, uid), f"/view/{image.name}"


def hand_over(jail: Jail, state: Path) -> str:
    """Copy a state file into the jail, for its user; its path there."""
    shutil.copyfile(state, jail.root / "state")
    shutil.chown(jail.root / "state", jail.uid, jail.uid)
    return "/state"


def test_each_snapshot_is_of_another_state(host: Host) -> None:
    # Else a restore from the wrong one would not be seen.
    answers = [taken.answers for taken in host.taken]
    assert len(set(answers)) == len(answers)
    assert len({who.split()[1] for who, _ in answers}) == 1


def test_every_tag_of_the_store_is_the_full_snapshot_of_its_pause(host: Host) -> None:
    with view(host, "store") as image:
        for taken in host.taken:
            assert digest(image(taken.tag)) == taken.truth


def test_explicit_files_are_the_full_snapshot_of_their_pause(host: Host) -> None:
    with view(host, "explicit") as image:
        last = host.taken[-1]
        assert digest(image(last.tag)) == last.truth


def test_firecracker_restores_every_tag_of_the_store(host: Host) -> None:
    with view(host, "store") as image:
        for taken in host.taken:
            with host.restored(taken, image(taken.tag)) as guest:
                assert guest.state() == taken.answers


@KINDS
def test_two_firecrackers_restore_from_one_view_at_once(host: Host, kind: str) -> None:
    last = host.taken[-1]
    with view(host, kind) as image, ExitStack() as stack:
        file = image(last.tag)
        first, second = [stack.enter_context(host.restored(last, file)) for _ in range(2)]
        assert first.state() == second.state() == last.answers
        first.work("dz")
        assert first.state() != last.answers
        assert second.state() == last.answers
        assert digest(file) == last.truth


@KINDS
def test_a_jailed_firecracker_restores_from_the_view(host: Host, kind: str) -> None:
    """Two at once, each as a user of its own."""
    last = host.taken[-1]
    with view(host, kind) as image, ExitStack() as stack:
        for uid in (_UID, _UID + 1):
            jail, file = stack.enter_context(jailed(host, image(last.tag), uid))
            jail.guest.load(hand_over(jail, last.state), file)
            assert jail.guest.uid() == uid
            assert jail.guest.state() == last.answers


def test_a_jailed_firecracker_gets_no_more_from_the_view_than_from_the_layers(host: Host) -> None:
    last = host.taken[-1]
    last.memory.chmod(0o600)
    try:
        with view(host, "store") as image, jailed(host, image(last.tag), _UID) as (jail, file):
            state = hand_over(jail, last.state)
            with pytest.raises(RefusedError, match="Permission denied"):
                jail.guest.load(state, file)
    finally:
        last.memory.chmod(0o644)


def test_a_diff_of_a_vm_restored_from_a_store_is_a_new_tag(host: Host) -> None:
    last = host.taken[-1]
    with view(host, "store") as image:
        with host.restored(last, image(last.tag), tracks=True) as guest:
            guest.work("zd")
            further = snapshots.take(guest, host.store, "further", last.tag, truth=True)
        until(image("further").exists, "the new tag did not appear")
        assert_is(host, further, image("further"))


def test_a_diff_of_a_vm_restored_from_explicit_files_goes_on_top(host: Host) -> None:
    last = host.taken[-1]
    with view(host, "explicit") as image, host.restored(last, image(""), tracks=True) as guest:
        guest.work("zd")
        further = snapshots.take(guest, host.store, "explicit", last.tag, truth=True)
    assert_goes_on_top(host, further)


def test_a_diff_of_a_vm_restored_in_a_jail_goes_on_top(host: Host) -> None:
    last, folder, full = host.taken[-1], host.directory / "jailed", host.directory / "full"
    with view(host, "store") as image, jailed(host, image(last.tag), _UID) as (jail, file):
        guest = jail.guest
        guest.load(hand_over(jail, last.state), file, tracks=True)
        guest.work("zd")
        answers = guest.state()
        folder.mkdir()
        guest.pause()
        jail.save("Diff", folder / "vmstate", folder / "memory.bin")
        jail.save("Full", host.directory / "full.vmstate", full)
    truth = digest(full)
    full.unlink()
    taken = Taken("jailed", folder / "memory.bin", folder / "vmstate", truth, answers)
    assert_goes_on_top(host, taken)


def assert_goes_on_top(host: Host, further: Taken) -> None:
    """A view of the chain and the further diff is that VM."""
    point = host.directory / f"view-{further.tag}"
    point.mkdir()
    with mounts.mounted(None, point, *chain_options([*host.taken, further])):
        assert_is(host, further, point / "memory.bin")


def assert_is(host: Host, further: Taken, file: Path) -> None:
    """The file is the VM, and restores it, though the diff is a small part of its memory."""
    assert further.memory.stat().st_blocks * 512 < MEBIBYTES << 18
    assert digest(file) == further.truth
    with host.restored(further, file) as guest:
        assert guest.state() == further.answers


def test_a_diff_that_cp_has_harmed_makes_another_guest(host: Host) -> None:
    """So what these tests compare tells a wrong guest from a right one. A seal would save it."""
    *below, last = host.taken
    harmed = host.directory / "harmed"
    harmed.mkdir()
    copy = Taken(last.tag, harmed / "memory.bin", last.state, last.truth, last.answers)
    point = harmed / "view"
    point.mkdir()
    for sealed in (False, True):
        if sealed:
            succeed("seal", last.memory)
            shutil.copyfile(f"{last.memory}.bmap", f"{copy.memory}.bmap")
        command: list[str | Path] = ["cp", "--sparse=always", last.memory, copy.memory]
        subprocess.run(command, check=True, timeout=60)
        with mounts.mounted(None, point, *chain_options([*below, copy])):
            assert (digest(point / "memory.bin") == last.truth) is sealed
            with host.restored(last, point / "memory.bin") as guest:
                assert (guest.state() == last.answers) is sealed
    Path(f"{last.memory}.bmap").unlink()
