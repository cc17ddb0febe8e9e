"""The C programs of the benchmark, compiled when they are needed, and what they print."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tests.bench.measure import NotMeasured

_SOURCES = Path(__file__).parent
_BUILD = Path(__file__).parents[2] / "build" / "bench"
_FLAGS = ("-O2", "-Wall", "-Wextra", "-Werror", "-pthread")
_TIMEOUT = 300


def need(program: str) -> str:
    """The path of a program; NotMeasured where it is not installed."""
    found = shutil.which(program)
    if found is None:
        raise NotMeasured(f"{program} is not installed")
    return found


@cache
def compiled(name: str, *, shared: bool = False, libraries: str = "") -> Path:
    """The program (or shared object) made of NAME.c; NotMeasured where it cannot be compiled."""
    _BUILD.mkdir(parents=True, exist_ok=True)
    target = _BUILD / (f"{name}.so" if shared else name)
    flags = [*_FLAGS, *(["-shared", "-fPIC"] if shared else [])]
    linked = _flags_of(libraries) if libraries else []
    source = _SOURCES / f"{name}.c"
    run([need("gcc"), *flags, str(source), "-o", str(target), *linked])
    return target


def _flags_of(libraries: str) -> list[str]:
    return shlex.split(run([need("pkg-config"), "--cflags", "--libs", libraries]))


def run(command: Sequence[str | Path], timeout: float = _TIMEOUT) -> str:
    """What a command prints; NotMeasured with what it said when it fails or takes too long."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise NotMeasured(f"{words[0]} did not end within {timeout:.0f} s") from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-300:]
        raise NotMeasured(f"{Path(words[0]).name} ended with status {done.returncode}: {said}")
    return done.stdout


def client(mode: str, file: Path, *arguments: int) -> list[float]:
    """The seconds that client.c prints."""
    return [float(line) for line in run(client_command(mode, file, *arguments)).split()]


def client_command(mode: str, file: Path, *arguments: int) -> list[str]:
    """The command that `client` runs."""
    return [str(compiled("client")), mode, str(file), *map(str, arguments)]


def read_through(file: Path, *, passes: int = 1, cold: bool = True) -> list[float]:
    """Seconds of each pass of read(2) over the file, its cache dropped before the first."""
    return client("read", file, passes, int(cold))


def touch(file: Path, pages: int, seed: int, *, threads: int = 1, cpu: int = -1) -> float:
    """Seconds for the first touch of so many random pages through a mapping, cache dropped."""
    return client("touch", file, pages, seed, threads, cpu, 1)[0]
