"""Every way of reading a mounted view gives the bytes of the oracle."""

from __future__ import annotations

import json
import mmap
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.inputs import unchanged
from tests.support.mounts import mounted

Extents = list[tuple[int, bytes]]

SIZES = (1, 4095, PAGE, PAGE + 1, 37 * PAGE + 123, 300 * PAGE, 700 * PAGE + 4095)

# Touches every byte of a shared mapping in a process that can be killed.
MAPPED = """
import mmap, sys
with open(sys.argv[1], 'rb') as file:
    view = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
    sys.stdout.buffer.write(view[:])
"""


def random_diff(chance: random.Random, layer: int, size: int) -> Extents:
    """Random whole pages (the last may be partial), some of them written zeros."""
    pages = -(-size // PAGE)
    extents = []
    # One page stays a hole: a diff without holes would be a complete image.
    hole = chance.randrange(pages)
    for _ in range(chance.choice((0, 1, 3, 20))):
        first = chance.randrange(pages)
        stop = min(first + chance.choice((1, 1, 2, 30)), pages)
        if not first <= hole < stop:
            start, length = first * PAGE, min(stop * PAGE, size) - first * PAGE
            zero = chance.random() < 0.25
            extents.append((start, bytes(length) if zero else signed(layer, start, length)))
    return extents


def random_base(chance: random.Random, size: int) -> Extents:
    if chance.random() < 0.3:
        return [(0, signed(0, 0, size))]
    starts = [chance.randrange(size) for _ in range(6)]
    return [(s, signed(0, s, min(chance.randrange(1, 9 * PAGE), size - s))) for s in starts]


def write_tag(store: Path, tag: str, parent: str | None, size: int, extents: Extents) -> Path:
    folder = store / tag
    folder.mkdir()
    document = {"memory": f"{tag}.mem"} | ({"parent_tag": parent} if parent else {})
    (folder / "snapshot.json").write_text(json.dumps(document))
    return write_layer(folder / f"{tag}.mem", size, extents)


def write_chains(store: Path, seed: int) -> tuple[dict[str, bytes], list[Path]]:
    """Chains of 0 to 6 diffs, one for each size, and the expected bytes of each tag."""
    chance = random.Random(seed)
    expected, paths = {}, []
    for n, size in enumerate(SIZES):
        layers: list[Extents] = []
        for depth in range((0, 1, 6, 2, 6, 4, 6)[n] + 1):
            extents = random_diff(chance, depth, size) if depth else random_base(chance, size)
            layers.append(extents)
            tag, parent = f"c{n}-{depth}", f"c{n}-{depth - 1}" if depth else None
            paths.append(write_tag(store, tag, parent, size, extents))
            expected[tag] = overlay_oracle(size, layers)
    return expected, paths


def view_of(mount: Path, tag: str) -> Path:
    return mount / tag / f"{tag}.mem"


def windows(chance: random.Random, size: int, count: int) -> list[tuple[int, int]]:
    found = [(0, size), (size - 1, 1), (size - 1, PAGE), (size, 1), (size + 5 * PAGE, PAGE)]
    for _ in range(count):
        offset = chance.randrange(size + 10)
        found.append((offset, chance.choice((1, 100, PAGE, chance.randrange(1, size + 2)))))
    return found


def same(found: bytes, expected: bytes, what: str) -> None:
    """An assertion whose failure does not print megabytes."""
    if found != expected:
        pairs = zip(found, expected, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), "the end")
        pytest.fail(f"{what}: {len(found)} bytes for {len(expected)}, first difference at {first}")


@pytest.mark.parametrize("seed", range(1, 5))
def test_every_window_by_pread_and_mmap(public_path: Path, mountpoint: Path, seed: int) -> None:
    store = public_path / "store"
    store.mkdir()
    expected, paths = write_chains(store, seed)
    chance = random.Random(seed)
    with unchanged(paths), mounted(store, mountpoint):
        assert sorted(os.listdir(mountpoint)) == sorted(expected)
        for tag, memory in expected.items():
            path = view_of(mountpoint, tag)
            assert path.stat().st_size == len(memory)
            with path.open("rb", buffering=0) as file:
                for offset, length in windows(chance, len(memory), 25):
                    found = os.pread(file.fileno(), length, offset)
                    same(found, memory[offset : offset + length], f"{tag} at {offset}")
                # O_DIRECT bypasses the page cache: the daemon itself gets odd ranges and the end.
                with mmap.mmap(-1, 64 * PAGE) as buffer:
                    direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
                    for page in {0, len(memory) // PAGE, max(0, len(memory) // PAGE - 3)}:
                        count = os.preadv(direct, [buffer], page * PAGE)
                        window = memory[page * PAGE :][: 64 * PAGE]
                        same(buffer[:count], window, f"{tag} direct at page {page}")
                    os.close(direct)
            done = subprocess.run(
                [sys.executable, "-c", MAPPED, path], capture_output=True, timeout=60
            )
            same(done.stdout, memory, f"{tag} mapped: {done.stderr[-200:]!r}")


def test_sixteen_readers_at_once(public_path: Path, mountpoint: Path) -> None:
    size = 2000 * PAGE + 77
    store = public_path / "store"
    store.mkdir()
    chance = random.Random(3)
    layers: list[Extents] = [[(0, signed(0, 0, size))]]
    layers += [random_diff(chance, n, size) + random_diff(chance, n, size) for n in range(1, 6)]
    for n, extents in enumerate(layers):
        write_tag(store, f"t{n}", f"t{n - 1}" if n else None, size, extents)
    expected = [overlay_oracle(size, layers[: n + 1]) for n in range(len(layers))]

    def read(reader: int) -> int:
        chance = random.Random(reader)
        wrong = 0
        for _ in range(40):
            n = chance.randrange(len(layers))
            fd = os.open(view_of(mountpoint, f"t{n}"), os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                for _ in range(8):
                    offset, length = chance.randrange(size), chance.choice((1, PAGE, 50 * PAGE))
                    found = os.pread(fd, length, offset)
                    wrong += found != expected[n][offset : offset + length]
            finally:
                os.close(fd)
        return wrong

    # For the first readers no chain is open.
    with mounted(store, mountpoint), ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(read, range(16))) == 0


def test_statistics_are_honest(public_path: Path, mountpoint: Path) -> None:
    size = 4096 * PAGE + 1
    end = 4096 * PAGE
    layers: list[Extents] = [
        [(8 * PAGE, signed(0, 8 * PAGE, 20 * PAGE))],
        [(10 * PAGE, signed(1, 10 * PAGE, 3 * PAGE)), (end, signed(1, end, 1))],
        [(3000 * PAGE, bytes(2 * PAGE))],
    ]
    paths = [
        write_layer(public_path / f"{n}.mem", size, extents) for n, extents in enumerate(layers)
    ]
    options = ["--base", paths[0], "--diff", paths[1], "--diff", paths[2]]
    with mounted(None, mountpoint, *map(str, options)):
        view = mountpoint / "0.mem"
        status = view.stat()
        assert status.st_size == size
        # 20 pages of the base, the last byte, and the zeros that were written.
        assert 22 * PAGE <= status.st_blocks * 512 <= 24 * PAGE
        du = subprocess.run(["du", "-B1", view], capture_output=True, timeout=60, check=True)
        assert int(du.stdout.split()[0]) == status.st_blocks * 512
        # No holes are reported: SEEK_DATA finds the whole view to be data.
        with view.open("rb") as file:
            assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == 0
            assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == size


def test_flattened_image_is_the_view(public_path: Path, mountpoint: Path) -> None:
    store = public_path / "store"
    store.mkdir()
    expected, paths = write_chains(store, 7)
    tags = [tag for n, tag in enumerate(expected) if n % 3 == 0]
    with unchanged(paths), mounted(store, mountpoint):
        for tag in tags:
            image = public_path / f"{tag}.flat"
            command: list[str | Path] = [
                sys.executable,
                "-m",
                "diffmergefs",
                "flatten",
                store / tag,
                "-o",
                image,
            ]
            done = subprocess.run(command, capture_output=True, timeout=60)
            assert done.returncode == 0, done.stderr
            flat = image.read_bytes()
            same(flat, expected[tag], f"{tag} flattened")
            same(view_of(mountpoint, tag).read_bytes(), flat, f"{tag} viewed")


def test_bytes_after_the_end_of_a_mapping_are_zeros(public_path: Path, mountpoint: Path) -> None:
    size = 5 * PAGE + 10
    base = write_layer(public_path / "base", size, [(0, signed(0, 0, size))])
    diff = write_layer(public_path / "diff", size, [(5 * PAGE, signed(1, 5 * PAGE, 10))])
    code = (
        "import ctypes, mmap, sys\n"
        "file = open(sys.argv[1], 'rb')\n"
        "view = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)\n"
        "address = ctypes.addressof(ctypes.c_char.from_buffer(view))\n"
        "sys.stdout.buffer.write(ctypes.string_at(address, 6 * mmap.PAGESIZE))\n"
    )
    with mounted(None, mountpoint, "--base", str(base), "--diff", str(diff)):
        command: list[str | Path] = [sys.executable, "-c", code, mountpoint / "base"]
        done = subprocess.run(command, capture_output=True, timeout=60)
    expected = signed(0, 0, 5 * PAGE) + signed(1, 5 * PAGE, 10) + bytes(PAGE - 10)
    same(done.stdout, expected, f"the last page: {done.stderr[-200:]!r}")
