"""Reading an image: in order, at random, by many, and when it is cached already."""

from __future__ import annotations

import importlib
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path

from tests.bench import profile, programs, servers
from tests.bench.images import Chain, Images
from tests.bench.measure import (
    MIB,
    PAGE,
    Contestant,
    Figures,
    NotMeasured,
    Record,
    Scale,
    alternate,
    drop,
    little_free,
    touch_free,
    warm,
)
from tests.bench.programs import client, client_command, need, read_through, touch
from tests.bench.servers import Server
from tests.bench.write_cases import filesystem
from tests.support import faulty

Start = tuple[str, Callable[[], AbstractContextManager[Server]]]

#: The number of diffs in the chain that is compared with the peers.
MAIN_DEPTH = 3
#: Those whose requests on one CPU are sampled, as long as so many rounds take.
_PROFILED = ("diffmergefs", "pyfuse3 constant", "C floor")
_PROFILED_ROUNDS = 5
_SLOW_SECONDS = 0.005
_CLIENTS = 8
_DROP_SECONDS = 1.5  # what was served last is dropped within a second


def depth_name(depth: int) -> str:
    return "diffmergefs" if depth == MAIN_DEPTH else f"diffmergefs, depth {depth}"


def sequential(images: Images, record: Record) -> None:
    """read(2) of 1 MiB from start to end, cold and then warm, each at its own best readahead."""
    with ExitStack() as stack:
        peers = _peers(stack, images, record)
        views = _views(stack, images, record)
        warm_layers(images)
        tried = {server.name: _speeds(server, images.scale) for server in peers}
        record.facts["MiB/s by read_ahead_kb"] = tried
        best = {name: max(sizes, key=lambda kib: sizes[kib]) for name, sizes in tried.items()}
        record.facts["best read_ahead_kb"] = best
        for server in (*peers, *views):
            server.set_readahead(best.get(server.name, best.get("diffmergefs", 128)))

        def run(server: Server) -> Figures:
            cold, again = read_through(server.file, passes=2)
            return {
                server.name: ("MiB/s", _speed(images, cold)),
                f"{server.name}, warm": ("MiB/s", _speed(images, again)),
            }

        def flattened() -> Figures:
            (seconds,) = read_through(images.flat, cold=False)
            return {"flattened, warm": ("MiB/s", _speed(images, seconds))}

        runs = [*_contestants([*peers, *views], run), Contestant("flattened, warm", flattened)]
        if images.scale.holds_memory:
            # What each of them shows stays in the page cache until it is its turn again.
            stack.enter_context(little_free((len(runs) + 1) * images.scale.image))
        alternate(record, runs, images.scale.rounds, lambda: warm_layers(images))


def random_two_cpus(images: Images, record: Record) -> None:
    """First touch of random pages by one thread; client and server have a CPU each."""
    _random(images, record, server_cpu=1)


def random_one_cpu(images: Images, record: Record) -> None:
    """The same with client and server on one CPU: what each program costs by itself."""
    _random(images, record, server_cpu=0, profiled=_PROFILED)


def _random(images: Images, record: Record, server_cpu: int, profiled: Sequence[str] = ()) -> None:
    touches = images.scale.touches
    with ExitStack() as stack:
        peers = _peers(stack, images, record)
        views = _views(stack, images, record)
        for server in (*peers, *views):
            server.pin(server_cpu)

        def run(server: Server) -> Figures:
            before = server.cpu_seconds()
            seconds = touch(server.file, touches, seed=11, cpu=0)
            used = server.cpu_seconds() - before
            return {
                server.name: ("us", seconds / touches * 1e6),
                f"{server.name}, server's CPU time": ("us", used / touches * 1e6),
            }

        def flattened() -> Figures:
            seconds = client("touch", images.flat, touches, 11, 1, 0, 0)[0]
            return {"flattened, warm": ("us", seconds / touches * 1e6)}

        runs = [*_contestants([*peers, *views], run), Contestant("flattened, warm", flattened)]
        alternate(record, runs, images.scale.rounds, lambda: _ready_for(touches, images))
        note_profiles([server for server in peers if server.name in profiled], images, record)


def note_profiles(running: Sequence[Server], images: Images, record: Record) -> None:
    """Profile touches that come after those that count, since sampling slows them down."""
    count = min(images.scale.touches * _PROFILED_ROUNDS, images.scale.image // PAGE)
    for server in running:
        warm_layers(images)
        command = client_command("touch", server.file, count, 17, 1, 0, 1)
        pids = [process.pid for process in server.processes]
        profile.note(record, server.name, partial(profile.touches, command, count, 0, pids))


def threads(images: Images, record: Record) -> None:
    """First touch of random pages by eight threads at once, on all CPUs."""
    touches = images.scale.touches // 4 * _CLIENTS
    with ExitStack() as stack:
        peers = _peers(stack, images, record)
        views = _views(stack, images, record)

        def run(server: Server) -> Figures:
            seconds = touch(server.file, touches, seed=12, threads=_CLIENTS)
            return {server.name: ("us", seconds / touches * 1e6)}

        runs = _contestants([*peers, *views], run)
        alternate(record, runs, images.scale.rounds, lambda: _ready_for(touches, images))


def cached(images: Images, record: Record) -> None:
    """A view of which all is in the page cache, and the flattened file: no server is asked."""
    pages = images.scale.image // PAGE

    def run(name: str, file: Path) -> Figures:
        _, again = read_through(file, passes=2, cold=False)
        return {
            f"{name}: read": ("MiB/s", _speed(images, again)),
            f"{name}: page fault": ("us", client("touchall", file, 13)[0] / pages * 1e6),
            f"{name}: MADV_POPULATE_READ": ("us", client("populate", file)[0] / pages * 1e6),
        }

    with ExitStack() as stack:
        views = _views(stack, images, record, heavy=False)
        main = _view(stack, images, record, MAIN_DEPTH)
        c = _floor(stack, images, record)
        # The readahead decides how the page cache is built up, so all have that of the view.
        for server, view in zip(c, main, strict=False):
            server.set_readahead(view.readahead())
        servers_and_names = [(server.name, server.file) for server in (*main, *c, *views)]
        runs = [
            Contestant(name, partial(run, name, file))
            for name, file in (*servers_and_names, ("flattened", images.flat))
        ]
        alternate(record, runs, images.scale.rounds)
        profiled = [(server.name, server.file) for server in (*main, *c)]
        for name, file in (*profiled, ("flattened", images.flat)):
            read_through(file, cold=False)
            command = client_command("read", file, _PROFILED_ROUNDS, 0)
            profile.note(record, name, partial(profile.program, command, pages * _PROFILED_ROUNDS))


def drop_behind(images: Images, record: Record) -> None:
    """What --drop-behind costs a cold read in order, and what it leaves of the layers in memory."""
    servers.need_option("--drop-behind")
    chain = images.chain(MAIN_DEPTH)
    with ExitStack() as stack:
        options: dict[str, tuple[str, ...]] = {"kept": (), "dropped": ("--drop-behind",)}
        views = [
            stack.enter_context(servers.diffmergefs(images.directory, chain, *words, name=name))
            for name, words in options.items()
        ]

        def run(server: Server) -> Figures:
            warm(*chain.layers)
            (seconds,) = read_through(server.file)
            time.sleep(_DROP_SECONDS)
            return {
                server.name: ("MiB/s", _speed(images, seconds)),
                f"{server.name}: layers left in memory": ("MiB", _resident(chain) / MIB),
            }

        alternate(record, _contestants(views, run), images.scale.rounds)


def slow_store(images: Images, record: Record) -> None:
    """Random reads by one client and by eight, where each read of the base takes 5 ms."""
    source, point = images.directory / "slow-source", images.directory / "slow"
    source.mkdir()
    point.mkdir()
    (source / images.base.name).symlink_to(images.base)
    reads = images.scale.slow_reads
    with ExitStack() as stack:
        store = stack.enter_context(faulty.mounted(source, point))
        base = store.path / images.base.name
        store.slow_down(base.name, _SLOW_SECONDS)
        Server("slow store", base, point).set_readahead(4)
        chain = Chain(base, images.chain(1).diffs)
        running = [stack.enter_context(servers.diffmergefs(images.directory, chain))]
        export = lambda: servers.qemu_export(images.directory, images, base)  # noqa: E731
        running += _started(stack, record, [("qemu export", export)])

        def run(server: Server) -> Figures:
            found = {}
            for count in (1, _CLIENTS):
                drop(base)
                (seconds,) = client("reads", server.file, reads, 14 + count, count, 1)
                name = f"{server.name}: {count} client{'s' if count > 1 else ''}"
                found[name] = ("reads/s", reads * count / seconds)
            return found

        alternate(record, _contestants(running, run), images.scale.rounds)


def rediff(memory: Path, scale: Scale, record: Record) -> None:
    """`rediff` of two complete images that are equal and cached, by one job and by two; and cmp."""
    try:
        compare = importlib.import_module("tests.bench.compare")
    except ImportError as error:
        raise NotMeasured("this build has no rediff (tests/bench/compare.py)") from error
    with filesystem("ext4", memory, 2 * scale.image + 512 * MIB) as root:
        pair = compare.write_equal(root, scale.image // MIB)
        ways: dict[str, Callable[[], object]] = {
            "rediff": partial(compare.run_rediff, *pair, root / "diff", 1),
            "rediff, 2 jobs": partial(compare.run_rediff, *pair, root / "diff", 2),
            "cmp": partial(programs.run, ["cmp", *pair]),
        }

        def measure(name: str) -> Figures:
            return {name: ("s", compare.seconds(ways[name]))}

        runs = [Contestant(name, partial(measure, name)) for name in ways]
        alternate(record, runs, scale.rounds, lambda: warm(*pair))


def _peers(stack: ExitStack, images: Images, record: Record) -> list[Server]:
    # All that are compared, the view at MAIN_DEPTH first, each with its bytes verified.
    where = images.directory
    starts: list[Start] = [
        ("diffmergefs", lambda: servers.diffmergefs(where, images.chain(MAIN_DEPTH))),
        ("qemu export", lambda: servers.qemu_export(where, images)),
        ("nbdkit + nbdfuse", lambda: servers.nbd(where, images)),
    ]
    sound = _sound(_started(stack, record, starts), images.verify, record)
    sound += _floor(stack, images, record)
    # There is nothing to verify in an answer that is always the same.
    ceiling = ("pyfuse3 constant", lambda: servers.constant(where, images.scale.image))
    return sound + _started(stack, record, [ceiling])


def _floor(stack: ExitStack, images: Images, record: Record) -> list[Server]:
    start = ("C floor", lambda: servers.floor(images.directory, images.flat))
    return _sound(_started(stack, record, [start]), images.verify, record)


def _views(stack: ExitStack, images: Images, record: Record, *, heavy: bool = True) -> list[Server]:
    # The views of other depths than MAIN_DEPTH.
    depths = [depth for depth in images.scale.depths if depth != MAIN_DEPTH]
    found = [view for depth in depths for view in _view(stack, images, record, depth)]
    if heavy:
        name = f"diffmergefs, 8 x {images.scale.dirty_pages:,}"
        start = (name, lambda: servers.diffmergefs(images.directory, images.heavy, name=name))
        found += _sound(_started(stack, record, [start]), images.verify_heavy, record)
    return found


def _view(stack: ExitStack, images: Images, record: Record, depth: int) -> list[Server]:
    chain, name = images.chain(depth), depth_name(depth)
    start = (name, lambda: servers.diffmergefs(images.directory, chain, name=name))
    return _sound(_started(stack, record, [start]), images.verify, record)


def _started(stack: ExitStack, record: Record, starts: Sequence[Start]) -> list[Server]:
    running = []
    for name, start in starts:
        try:
            running.append(stack.enter_context(start()))
        except Exception as error:
            record.miss(name, error)
    return running


def _sound(
    running: Sequence[Server], verify: Callable[[Path], str], record: Record
) -> list[Server]:
    sound = []
    for server in running:
        try:
            verify(server.file)
            sound.append(server)
        except Exception as error:
            record.miss(server.name, error)
    return sound


def _contestants(running: Sequence[Server], run: Callable[[Server], Figures]) -> list[Contestant]:
    return [Contestant(server.name, partial(run, server)) for server in running]


def _speeds(server: Server, scale: Scale) -> dict[int, float]:
    # MiB/s for each size; one that it does not matter to has the first as its best.
    found = {}
    for kib in scale.readaheads:
        server.set_readahead(kib)
        found[kib] = max(scale.image / MIB / read_through(server.file)[0] for _ in range(2))
    return found


def _speed(images: Images, seconds: float) -> float:
    return images.scale.image / MIB / seconds


def warm_layers(images: Images) -> None:
    """Have all layers of the images in the page cache."""
    layers = {layer for depth in images.scale.depths for layer in images.chain(depth).layers}
    warm(*layers, *images.heavy.layers, images.flat, images.overlay)


def _ready_for(touches: int, images: Images) -> None:
    warm_layers(images)
    # Each touch takes a page of memory: had the machine's host to give it first, that would be a
    # third of its time, and of all the others' in some rounds.
    touch_free(4 * touches * PAGE)


def _resident(chain: Chain) -> int:
    command = [need("fincore"), "--json", "--bytes", "--output", "RES", *map(str, chain.layers)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return sum(int(entry["res"]) for entry in json.loads(text)["fincore"])
