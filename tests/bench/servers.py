"""The servers that are measured against each other, each a process and a file that it shows."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.bench.images import Chain, Images
from tests.bench.measure import NotMeasured
from tests.bench.programs import compiled, need
from tests.support import mounts, mounttable
from tests.support.processes import children_of

_ROOT = Path(__file__).parents[2]
_READY_SECONDS = 60
_END_SECONDS = 20
_PROGRAM = [sys.executable, "-m", "diffmergefs"]


@dataclass
class Server:
    """A server at work: `file` is what it shows, and `processes` those that were started."""

    name: str
    file: Path
    point: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def pid(self) -> int:
        """The process that answers: a keeper's child."""
        return (children_of(self.processes[0].pid) or [self.processes[0].pid])[-1]

    def _pids(self) -> list[int]:
        started = [process.pid for process in self.processes]
        return [*started, *(child for pid in started for child in children_of(pid))]

    def pin(self, cpu: int | None) -> None:
        """Keep all threads of its processes on one CPU, or with None let them go anywhere."""
        cpus = range(os.cpu_count() or 1) if cpu is None else [cpu]
        for pid in self._pids():
            for thread in os.listdir(f"/proc/{pid}/task"):
                os.sched_setaffinity(int(thread), cpus)

    def readahead(self) -> int:
        """read_ahead_kb of its mount."""
        return int(self._bdi().read_text(encoding="ascii"))

    def set_readahead(self, kib: int) -> int:
        """Set read_ahead_kb of its mount; what it was."""
        before = self.readahead()
        self._bdi().write_text(f"{kib}\n", encoding="ascii")
        return before

    def cpu_seconds(self) -> float:
        """The processor's time that its processes have used so far."""
        total = 0
        for pid in self._pids():
            for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
                with suppress(OSError):
                    total += int(path.read_text(encoding="ascii").split()[0])
        return total / 1e9

    def bytes_read(self) -> int:
        """The bytes that its processes have got from read(2) and the like, FUSE requests too."""
        total = 0
        for pid in self._pids():
            text = Path(f"/proc/{pid}/io").read_text(encoding="ascii")
            total += int(text.split()[1])
        return total

    def resident(self) -> int:
        """Bytes of memory of its processes (Rss less what they share), and of their own files."""
        total = _memory_files(self._pids()[0])
        for n, pid in enumerate(self._pids()):
            facts = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
            sizes = dict(re.findall(r"^(\w+): +(\d+) kB$", facts, re.MULTILINE))
            # What a child shares with its keeper counts once: with the keeper.
            kinds = ("Rss",) if n == 0 else ("Private_Clean", "Private_Dirty")
            total += sum(int(sizes[kind]) for kind in kinds) * 1024
        return total

    def _bdi(self) -> Path:
        entry = mounttable.at(os.path.realpath(self.point))[-1]
        return Path(f"/sys/class/bdi/{entry.major}:{entry.minor}/read_ahead_kb")


def _memory_files(pid: int) -> int:
    total = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            if os.readlink(link).startswith("/memfd:"):
                total += link.stat().st_blocks * 512
    return total


@contextmanager
def serving(
    name: str,
    commands: Sequence[Sequence[str | Path]],
    point: Path,
    file: Path,
    says: bytes = b"",
) -> Iterator[Server]:
    """Start the commands, the one that mounts last, until `file` below `point` can be opened.

    And until they have said `says`.

    Afterwards the mount is gone and all processes have ended, by force where need be. NotMeasured
    with what they said where they don't get ready.
    """
    server = Server(name, file, point)
    real = os.path.realpath(point)  # resolved before its server is asked
    with tempfile.TemporaryFile() as log:
        try:
            for command in commands:
                process = subprocess.Popen(
                    [str(word) for word in command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=_ROOT,
                    start_new_session=True,  # Ctrl-C is for us: we end it in good order
                )
                server.processes.insert(0, process)
            _wait(server, real, says, lambda: os.pread(log.fileno(), 1 << 16, 0))
            yield server
        finally:
            _end(server, real)


def _wait(server: Server, real: str, says: bytes, said: Callable[[], bytes]) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while not (mounttable.at(real) and says in said() and _answers(server.file)):
        if any(process.poll() is not None for process in server.processes):
            text = " ".join(said().decode(errors="replace").split())[-300:]
            raise NotMeasured(f"{server.name} ended at the start: {text}")
        if time.monotonic() > deadline:
            raise NotMeasured(f"{server.name} was not ready within {_READY_SECONDS} s")
        time.sleep(0.01)


def _answers(file: Path) -> bool:
    # In a process of its own, which can be ended where a server does not answer.
    command = ["test", "-r", str(file)]
    try:
        return subprocess.run(command, check=False, timeout=_READY_SECONDS).returncode == 0
    except subprocess.TimeoutExpired as error:
        raise NotMeasured(f"{file} does not answer") from error


def _end(server: Server, real: str) -> None:
    while mounttable.at(real):
        with suppress(RuntimeError):  # it went away meanwhile; if not, the loop tries again
            mounttable.unmount(real)
        time.sleep(0.01)
    # A server whose mount is gone ends by itself; others are told.
    for process in server.processes:
        try:
            process.wait(1)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
    for process in server.processes:
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            mounts.abort(real)
            process.kill()
            process.wait(_END_SECONDS)


@cache
def has_option(option: str) -> bool:
    """Whether `diffmergefs mount` knows an option."""
    command = [*_PROGRAM, "mount", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=_ROOT).stdout
    return option in re.findall(r"--[\w-]+", text)


def need_option(option: str) -> None:
    """NotMeasured where `diffmergefs mount` does not know an option."""
    if not has_option(option):
        raise NotMeasured(f"this build has no mount {option}")


@contextmanager
def diffmergefs(
    directory: Path,
    source: Path | Chain,
    *options: str,
    name: str = "diffmergefs",
    shows: str | None = None,
) -> Iterator[Server]:
    """A view, mounted. Of a chain, the merged file; of a store, the path `shows` below it.

    It prefetches nothing unless the options say so, and keeps its state in `directory`.
    """
    point = _fresh(directory, name)
    mine = ["-f", f"--state-dir={directory}/state"]
    if has_option("--prefetch") and not any("prefetch" in option for option in options):
        mine.append("--prefetch=no")
    if isinstance(source, Chain):
        operands, file = source.options, point / source.base.name
    else:
        operands, file = [str(source)], point / shows if shows else point
    command = [*_PROGRAM, "mount", *mine, *options, *operands, str(point)]
    # Ready: the daemon has set its own readahead, which may be set anew from now on.
    with serving(name, [command], point, file, says=b" ready") as server:
        yield server


@contextmanager
def qemu_export(directory: Path, images: Images, raw: Path | None = None) -> Iterator[Server]:
    """QEMU's FUSE export of a qcow2 overlay, which holds the dirty pages, on the raw base.

    `raw` is another path to that base.
    """
    point = _fresh(directory, "qemu") / "export.img"
    point.touch()
    base = f"driver=file,node-name=file,filename={raw or images.base},read-only=on"
    overlay = f"driver=file,node-name=diff,filename={images.overlay},read-only=on"
    command = [
        *(need("qemu-storage-daemon"), "--blockdev", base, "--blockdev", overlay),
        *("--blockdev", "driver=raw,node-name=base,file=file,read-only=on"),
        *("--blockdev", "driver=qcow2,node-name=whole,file=diff,backing=base,read-only=on"),
        *("--export", f"type=fuse,id=e,node-name=whole,mountpoint={point},writable=off"),
    ]
    with serving("qemu export", [command], point, point) as server:
        yield server


@contextmanager
def nbd(directory: Path, images: Images) -> Iterator[Server]:
    """nbdkit's file plugin and nbdfuse, on the flattened image."""
    point = _fresh(directory, "nbd")
    socket = _fresh(directory, "nbd-socket") / "socket"
    kit: list[str | Path] = [need("nbdkit"), "-f", "-r", "-U", socket, "file", images.flat]
    fuse: list[str | Path] = [
        need("nbdfuse"),
        "-r",
        point / "image",
        f"nbd+unix:///?socket={socket}",
    ]
    wait: list[str | Path] = [
        "sh",
        "-c",
        'while [ ! -S "$0" ]; do sleep 0.05; done; exec "$@"',
        socket,
        *fuse,
    ]
    with serving("nbdkit + nbdfuse", [kit, wait], point, point / "image") as server:
        yield server


@contextmanager
def floor(directory: Path, flat: Path) -> Iterator[Server]:
    """The single-threaded C server over one mapping of the flattened image."""
    point = _fresh(directory, "floor")
    command: list[str | Path] = [compiled("floor", libraries="fuse3"), flat, point]
    with serving("C floor", [command], point, point / "image") as server:
        yield server


@contextmanager
def constant(directory: Path, size: int) -> Iterator[Server]:
    """The pyfuse3 server whose answer is always the same."""
    point = _fresh(directory, "constant")
    command = [sys.executable, "-m", "tests.bench.constant", str(size), str(point)]
    with serving("pyfuse3 constant", [command], point, point / "image") as server:
        yield server


def _fresh(directory: Path, name: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"{name.replace(' ', '-')}-", dir=directory))
