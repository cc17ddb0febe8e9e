"""A chain of snapshots that Firecracker itself takes, as a store in forkd's layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.vm import firecracker
from tests.vm.firecracker import Guest

#: What the guest does before each snapshot, and the snapshot's tag: the first is Full, the others
#: are Diffs. Each zeroes pages that have data below, or overwrites some that were zero.
STEPS = {"base": "", "dirtied": "d", "zeroed": "z", "both": "dz"}


@dataclass(frozen=True)
class Taken:
    """One snapshot: what the guest was in the pause in which it was taken."""

    tag: str
    memory: Path
    state: Path
    truth: str
    """The `digest` of a Full snapshot of the same pause; "" where none was asked for."""
    answers: tuple[str, str]
    """Who the guest says it is, and the checksum over its memory."""


def boot(
    folder: Path, directory: Path, kernel: Path, mebibytes: int, *, huge: bool = False
) -> Guest:
    """A guest that has just started, in a Firecracker in the directory that tracks its pages.

    They have 2 MiB if they are to be `huge`.
    """
    guest = firecracker.start(folder, directory, "boot")
    try:
        machine: dict[str, object] = {
            "vcpu_count": 1,
            "mem_size_mib": mebibytes,
            "track_dirty_pages": True,
        }
        machine |= {"huge_pages": "2M"} if huge else {}
        guest.call("PUT", "/machine-config", **machine)
        guest.call(
            "PUT",
            "/boot-source",
            kernel_image_path=str(kernel),
            boot_args="console=ttyS0 reboot=k panic=1",
        )
        guest.call("PUT", "/actions", action_type="InstanceStart")
        guest.wait_for("READY")
    except BaseException:
        guest.end()
        raise
    return guest


def take(guest: Guest, store: Path, tag: str, parent: str | None, *, truth: bool) -> Taken:
    """Take a snapshot of the guest into the store: a Full one if it has no parent, else a Diff.

    And if its `truth` is asked for, a Full one in the same pause. The guest goes on afterwards. The
    tag is in the store when it is whole: a mount of the store never sees a part of it.
    """
    answers = guest.state()
    folder = store.with_name("taking") / tag
    folder.mkdir(parents=True)
    guest.pause()
    guest.save("Diff" if parent else "Full", folder / "vmstate", folder / "memory.bin")
    found = ""
    if truth:
        # After the Diff: a Full snapshot starts the tracking anew too.
        full, state = folder / "full", folder / "full.vmstate"
        guest.save("Full", state, full)
        found = digest(full)
        full.unlink()
        state.unlink()
    guest.resume()
    document = {"memory": "memory.bin", "vmstate": "vmstate"}
    if parent:
        document["parent_tag"] = parent
    (folder / "snapshot.json").write_text(json.dumps(document), encoding="utf-8")
    store.mkdir(exist_ok=True)
    folder = folder.rename(store / tag)
    return Taken(tag, folder / "memory.bin", folder / "vmstate", found, answers)


def digest(path: Path) -> str:
    """A hash of all bytes of a file."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def take_chain(guest: Guest, store: Path, *, truth: bool) -> tuple[Taken, ...]:
    """Snapshots of the guest after each of the `STEPS`, each with its `truth` if that is asked."""
    found: list[Taken] = []
    for tag, commands in STEPS.items():
        guest.work(commands)
        found.append(take(guest, store, tag, found[-1].tag if found else None, truth=truth))
    return tuple(found)


def chain_options(taken: Sequence[Taken]) -> list[str]:
    """The command line's --base and --diff of these snapshots, oldest first."""
    base, *diffs = taken
    return [f"--base={base.memory}", *(f"--diff={diff.memory}" for diff in diffs)]
