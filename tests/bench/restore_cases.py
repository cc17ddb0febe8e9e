"""A real guest, restored from the flattened image and from views: when does it first answer?"""

from __future__ import annotations

import json
import time
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path

import diffmergefs as package
from tests.bench.goals import COLD_BESIDE, COLD_FLOOR, FLATTEN_FIRST, SMALL_PAGES
from tests.bench.guests import Stopped, answering, first_reply
from tests.bench.images import Chain
from tests.bench.measure import (
    MIB,
    Contestant,
    Figures,
    NotMeasured,
    Record,
    Scale,
    alternate,
    drop,
    touch_free,
    warm,
)
from tests.bench.programs import compiled, read_through, run
from tests.bench.servers import Server, diffmergefs, floor, need_option
from tests.bench.write_cases import filesystem
from tests.support import mounts
from tests.vm import qemu

_READAHEADS = (32, 128, 512, 1024, 4096)
_SETTLED_SECONDS = 20
_IN_MEMORY_MAX = 512 * MIB
_TOUCHED = 640 * MIB

FLATTEN_IN_MEMORY = {
    "ext4": f"{FLATTEN_FIRST}, ext4 in memory",
    "xfs": f"{FLATTEN_FIRST}, xfs in memory with reflink",
}


def restore(stopped: Stopped, scale: Scale, record: Record, memory: Path) -> None:
    """The first reply from each kind of memory, with and without MADV_HUGEPAGE.

    `memory` is a directory in memory, for filesystems on files.
    """
    _facts(stopped, record)
    place, is_small = stopped.flat.parent, stopped.machine.ram_size == scale.guests[0] * MIB
    with ExitStack() as stack:
        cold = stack.enter_context(_view(place, stopped, "cold"))
        cached = stack.enter_context(_view(place, stopped, "cached"))
        _verify(stopped, cold)
        read_through(cached.file)
        server = _floor(stack, stopped, cold.readahead(), record)
        runs: list[Contestant] = []
        for suffix, variant in (("", stopped), (SMALL_PAGES, stopped.small_pages())):
            runs += [
                _contestant(f"flattened, warm{suffix}", variant, stopped.flat),
                _contestant(f"view, cold{suffix}", variant, cold.file, cold),
                _contestant(f"view, warm{suffix}", variant, cached.file),
            ]
            runs += _prefetching(stack, variant, suffix, record)
            if server:
                runs.append(_contestant(f"{COLD_FLOOR}{suffix}", variant, server.file, server))
        rounds = scale.restore_rounds if is_small else scale.rounds
        alternate(record, runs, rounds, lambda: _ready_for(stopped, scale))
        # Apart: what a copy leaves to do, in memory and on disks, would be in the others' numbers.
        # So they have a cold view of their own beside them.
        flattening = partial(_flatten_first, stopped, stopped.chain, place / "out.mem")
        flatteners = [
            _contestant(COLD_BESIDE, stopped, cold.file, cold),
            Contestant(FLATTEN_FIRST, partial(flattening, FLATTEN_FIRST)),
        ]
        if stopped.machine.ram_size <= _IN_MEMORY_MAX:
            for kind, name in FLATTEN_IN_MEMORY.items():
                flatteners += _flattening(stack, stopped, memory, kind, name, record)
        rounds = scale.rounds if is_small else scale.long_rounds
        copied = stopped.machine.ram_size
        alternate(record, flatteners, rounds, lambda: _ready_for(stopped, scale, copied))


def readahead(stopped: Stopped, scale: Scale, record: Record) -> None:
    """The first reply from a cold view, by read_ahead_kb, of a guest mapped in 4 KiB pages."""
    _facts(stopped, record)
    small = stopped.small_pages()
    with _view(stopped.flat.parent, stopped, "readahead") as view:

        def measure(kib: int) -> Figures:
            view.set_readahead(kib)
            drop(view.file)
            before = view.bytes_read()
            seconds = first_reply(small, view.file)
            read = view.bytes_read() - before
            return {f"{kib} KiB": ("s", seconds), f"{kib} KiB: read": ("MiB", read / MIB)}

        runs = [Contestant(f"{kib} KiB", partial(measure, kib)) for kib in _READAHEADS]
        alternate(record, runs, scale.rounds, lambda: _ready_for(stopped, scale))


def many(stopped: Stopped, scale: Scale, record: Record) -> None:
    """VMs that are alive at once on one view: the later ones, against those on one flat file."""
    _facts(stopped, record)
    with _view(stopped.flat.parent, stopped, "many") as view:

        def fleet(name: str, file: Path) -> Figures:
            drop(view.file)
            found: dict[str, tuple[str, float]] = {}
            with ExitStack() as vms:
                seconds, vm = vms.enter_context(answering(stopped, file))
                found[f"{name}: first VM"] = ("s", seconds)
                time.sleep(1)  # it goes on for a moment, as a first VM does
                bytes_before, reads_before = view.bytes_read(), _reads(view, record)
                later = []
                for _ in range(scale.together - 1):
                    seconds, vm = vms.enter_context(answering(stopped, file))
                    later.append(seconds)
                found[f"{name}: later VMs"] = ("s", sum(later) / max(1, len(later)))
                if name == "view":
                    asked = view.bytes_read() - bytes_before
                    found["daemon: bytes read for the later VMs"] = ("bytes", asked)
                    if reads_before is not None:
                        requests = (_reads(view, record) or 0) - reads_before
                        found["daemon: read requests for the later VMs"] = ("requests", requests)
                rss, pss = _mapped(vm.pid, file)
                found[f"{name}: Rss of the image in a VM"] = ("MiB", rss / MIB)
                found[f"{name}: Pss of the image in a VM"] = ("MiB", pss / MIB)
            return found

        record.facts["VMs at once"] = scale.together
        runs = [
            Contestant("flattened", partial(fleet, "flattened", stopped.flat)),
            Contestant("view", partial(fleet, "view", view.file)),
        ]
        alternate(record, runs, scale.rounds, lambda: _ready_for(stopped, scale))


def _ready_for(stopped: Stopped, scale: Scale, copied: int = 0) -> None:
    warm(*stopped.chain.layers, stopped.flat)
    # What a guest and the pages that it touches take, and a copy: had the machine's host to give
    # it first, that would be as long as all else.
    if scale.holds_memory:
        touch_free(_TOUCHED + copied)


def _facts(stopped: Stopped, record: Record) -> None:
    record.facts["QEMU"] = ".".join(map(str, qemu.version(stopped.machine.program)))
    record.facts["maps read-only"] = stopped.read_only
    record.facts["guest MiB"] = stopped.machine.ram_size // MIB


def _view(
    place: Path, stopped: Stopped, name: str, *options: str
) -> AbstractContextManager[Server]:
    return diffmergefs(place, stopped.chain, *stopped.options, *options, name=name)


def _verify(stopped: Stopped, view: Server) -> None:
    # Every byte: what differs would be the guest's.
    run(["cmp", stopped.flat, view.file])


def _contestant(name: str, stopped: Stopped, ram: Path, cold: Server | None = None) -> Contestant:
    def measure() -> Figures:
        if cold is not None:
            drop(cold.file)
            # That opened the file: what it set off, such as a prefetch, ends with its close.
            time.sleep(0.05)
        return {name: ("s", first_reply(stopped, ram))}

    return Contestant(name, measure)


def _prefetching(
    stack: ExitStack, stopped: Stopped, suffix: str, record: Record
) -> list[Contestant]:
    # A view that prefetches what one recorded restore has touched, in both ways.
    place = stopped.flat.parent
    sets = place / f"working-sets{suffix.replace(' ', '-')}"
    names = {way: f"view, cold, prefetch={way}{suffix}" for way in ("notify", "fadvise")}
    try:
        for option in ("--record", "--prefetch", "--working-set-dir"):
            need_option(option)
        where = f"--working-set-dir={sets}"
        with _view(place, stopped, "record", "--record", where) as recording:
            first_reply(stopped.small_pages(), recording.file)
            wait_for_record(sets)
    except Exception as error:
        for name in names.values():
            record.miss(name, error)
        return []
    runs = []
    for way, name in names.items():
        try:
            if way == "notify":
                have_fusectl(stack)
            view = stack.enter_context(
                _view(place, stopped, f"prefetch-{way}", f"--prefetch={way}", where)
            )
        except Exception as error:
            record.miss(name, error)
            continue
        runs.append(_contestant(name, stopped, view.file, view))
    return runs


def _floor(stack: ExitStack, stopped: Stopped, readahead: int, record: Record) -> Server | None:
    try:
        server = stack.enter_context(floor(stopped.flat.parent, stopped.flat))
        server.set_readahead(readahead)
        _verify(stopped, server)
        return server
    except Exception as error:
        record.miss(COLD_FLOOR, error)
        return None


def have_fusectl(stack: ExitStack) -> None:
    """Have fusectl mounted for as long as the stack: else fadvise would take notify's place."""
    if not mounts.CONNECTIONS.is_mount():
        run(mounts.MOUNT_FUSECTL)
        stack.callback(run, ["umount", mounts.CONNECTIONS])


def wait_for_record(sets: Path) -> None:
    """Wait until a mount has written what it recorded, which it does after the last close."""
    deadline = time.monotonic() + _SETTLED_SECONDS
    while not list(sets.glob("*.json")):
        if time.monotonic() > deadline:
            raise NotMeasured("the restore left no record of its working set")
        time.sleep(0.05)


def _flatten_first(stopped: Stopped, chain: Chain, out: Path, name: str) -> Figures:
    # Without the start of a Python of its own, which the command would add.
    began = time.perf_counter()
    try:
        image = package.open_chain(str(chain.base), [str(diff) for diff in chain.diffs])
        with image.view as view:
            package.flatten(view, out)
        return {name: ("s", first_reply(stopped, out, began))}
    finally:
        out.unlink(missing_ok=True)


def _flattening(
    stack: ExitStack, stopped: Stopped, memory: Path, kind: str, name: str, record: Record
) -> list[Contestant]:
    # The same on a filesystem on a file in memory.
    size = stopped.machine.ram_size
    try:
        root = stack.enter_context(filesystem(kind, memory, 3 * size + 512 * MIB))
        copies = []
        for layer in stopped.chain.layers:
            copies.append(root / layer.name)
            run([compiled("copier"), "sendfile", copies[-1], layer])
        chain = Chain(copies[0], tuple(copies[1:]))
    except Exception as error:
        record.miss(name, error)
        return []
    return [Contestant(name, partial(_flatten_first, stopped, chain, root / "out.mem", name))]


def _reads(view: Server, record: Record) -> int | None:
    # What the daemon itself says of the read requests that it has answered.
    path = view.point / ".diffmergefs" / "status.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["reads"])
    except (OSError, ValueError, KeyError, TypeError):
        record.missing["daemon: read requests for the later VMs"] = "this build has no status.json"
        return None


def _mapped(pid: int, file: Path) -> tuple[int, int]:
    # Rss and Pss of a process's mappings of a file.
    sums = {"Rss:": 0, "Pss:": 0}
    counts = False
    for line in (
        Path(f"/proc/{pid}/smaps").read_text(encoding="ascii", errors="replace").split("\n")
    ):
        words = line.split()
        if words and "-" in words[0] and not words[0].endswith(":"):
            counts = words[-1] == str(file)
        elif counts and words and words[0] in sums:
            sums[words[0]] += int(words[1]) * 1024
    return sums["Rss:"], sums["Pss:"]
