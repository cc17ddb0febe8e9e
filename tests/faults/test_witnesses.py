"""Independent witnesses: QEMU's overlays and fio say the same as the views."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from diffmergefs import Segment, flatten, open_chain
from diffmergefs.core.sparse import data_extents
from tests.support.images import PAGE, signed, write_layer
from tests.support.inputs import unchanged
from tests.support.mounts import mounted

MIB = 1 << 20
PAGES = 4096
SIZE = PAGES * PAGE
IDENTICAL, DIFFERENT = 0, 1

# Runs of pages: a base with holes; a diff with a page of zeros, a run beyond the base's data and
# one up to the end; a second diff over parts of both and over a hole.
RUNS: list[list[tuple[int, int]]] = [
    [(0, 1500), (1700, 2500), (3000, 3001)],
    [(10, 11), (100, 200), (1490, 1510), (2600, 2700), (4000, 4096)],
    [(0, 1), (150, 160), (199, 201), (1600, 1601), (2699, 2702), (4095, 4096)],
]
ZEROS = (40, 44)


def contents(layer: int) -> list[tuple[int, bytes]]:
    """The extents of a layer; the first diff has zeros too, over data of the base."""
    found = [(a * PAGE, signed(layer, a * PAGE, (b - a) * PAGE)) for a, b in RUNS[layer]]
    if layer == 1:
        found.append((ZEROS[0] * PAGE, bytes((ZEROS[1] - ZEROS[0]) * PAGE)))
    return found


def run(*command: object, status: int = 0) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=100, cwd="/")
    assert done.returncode == status, done
    return done.stdout


@pytest.fixture
def layers(tmp_path: Path) -> Iterator[list[Path]]:
    found = [write_layer(tmp_path / f"{n:03}.mem", SIZE, contents(n)) for n in range(len(RUNS))]
    with unchanged(found):
        yield found


@pytest.fixture
def overlays(layers: Sequence[Path], tmp_path: Path) -> list[Path]:
    """The base, and qcow2 overlays on it into which QEMU wrote the same pages as the diffs hold."""
    found = [layers[0]]
    for n in range(1, len(layers)):
        path = tmp_path / f"{n}.qcow2"
        backing = ["-b", found[-1], "-F", "raw" if n == 1 else "qcow2"]
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", *backing, path)
        steps = []
        for number, (offset, data) in enumerate(contents(n)):
            source = tmp_path / f"{n}-{number}"
            source.write_bytes(data)
            steps += ["-c", f"write -q -s {source} {offset} {len(data)}"]
        run("qemu-io", "-f", "qcow2", *steps, path)
        found.append(path)
    return found


def options(layers: Sequence[Path]) -> list[str]:
    diffs = [word for diff in layers[1:] for word in ("--diff", str(diff))]
    return ["--base", str(layers[0]), *diffs]


@pytest.mark.parametrize("depth", [1, 2])
def test_qemu_img_compare(
    layers: list[Path], overlays: list[Path], tmp_path: Path, mountpoint: Path, depth: int
) -> None:
    """A view, its flattened file and QEMU's overlays are identical for `qemu-img compare`"""
    chain, top = layers[: depth + 1], overlays[depth]
    flat = tmp_path / "flat"
    with open_chain(chain[0], chain[1:]).view as view:
        flatten(view, flat)
    with mounted(None, mountpoint, *options(chain)):
        for image in (mountpoint / "000.mem", flat):
            compare = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", image]
            assert "Images are identical" in run(*compare, top)
            # It can tell them apart: the overlay of another depth is not the same.
            run(*compare, overlays[3 - depth], status=DIFFERENT)


@pytest.mark.parametrize("depth", [1, 2])
def test_qemu_img_map(
    layers: list[Path], overlays: list[Path], depth: int, seen: Callable[..., None]
) -> None:
    """Which overlay supplies what, for `qemu-img map`, is which layer supplies what"""
    text = run("qemu-img", "map", "--output=json", "-f", "qcow2", overlays[depth])
    with open_chain(layers[0], layers[1 : depth + 1]).view as view:
        ours = list(view.segments())
    assert joined(segment(entry, depth) for entry in json.loads(text)) == ours
    assert {found.layer for found in ours} == {None, *range(depth + 1)}
    seen(segments=len(ours))


def segment(entry: dict[str, Any], depth: int) -> Segment:
    """QEMU counts depth from the top; what it finds nowhere is a zero of the base."""
    start = entry["start"]
    is_hole = entry["zero"] and not entry["data"] and entry["depth"] == depth
    number = None if is_hole else depth - entry["depth"]
    return Segment(start, start + entry["length"], number)


def joined(segments: Iterator[Segment]) -> list[Segment]:
    found: list[Segment] = []
    for one in segments:
        if found and found[-1].layer == one.layer:
            one = Segment(found.pop().start, one.stop, one.layer)
        found.append(one)
    return found


# A file of fio, and how it was written: each block then says which file it is from, and where.
FIO = [
    *("--ioengine=psync", "--bs=4k", "--randrepeat=0", "--fallocate=none"),
    *("--verify_state_save=0", "--output-format=json"),
]


def fio(path: Path, name: str, how: Sequence[str], *more: str) -> dict[str, Any]:
    pattern = ["--verify=pattern", f'--verify_pattern="{name}"%o']
    job = [f"--name={name}", f"--filename={path}", f"--size={SIZE}", *how, *more]
    text = run("fio", *FIO, *pattern, *job)
    return dict(json.loads(text[text.index("{") :])["jobs"][0])


def written(path: Path, name: str, *how: str) -> None:
    with path.open("wb") as file:
        file.truncate(SIZE)
    assert fio(path, name, how, "--do_verify=0")["error"] == 0


def wrong_blocks(path: Path, name: str, *how: str) -> int:
    """How many of the blocks that fio wrote this way does it not find as it wrote them?"""
    how = tuple(word.replace("write", "read") for word in how)
    more = ["--readonly", "--continue_on_error=verify"]
    return int(fio(path, name, how, *more)["total_err"])


def blocks(path: Path) -> set[int]:
    with path.open("rb") as file:
        extents = data_extents(file.fileno(), SIZE)
        return {page for start, stop in extents for page in range(start // PAGE, stop // PAGE)}


def test_fio_verifies_through_the_mount(
    tmp_path: Path, mountpoint: Path, count: Callable[[int], int], seen: Callable[..., None]
) -> None:
    """fio writes a base and two diffs at random, and finds each block of each where it belongs"""
    rounds, checked = count(10), 0
    for n in range(rounds):
        base, one, two = (tmp_path / f"{n}-{name}" for name in ("base", "one", "two"))
        jobs = {
            base: ("base", "--rw=write"),
            one: ("one_", "--rw=randwrite", f"--randseed={2 * n + 1}", f"--io_size={4 * MIB}"),
            two: ("two_", "--rw=randwrite", f"--randseed={2 * n + 2}", f"--io_size={2 * MIB}"),
        }
        for path, job in jobs.items():
            written(path, *job)
        of_one, of_two = blocks(one), blocks(two)
        # The witness first: it finds its own blocks, and would not take another one's for them.
        assert wrong_blocks(one, *jobs[one]) == 0
        assert wrong_blocks(base, *jobs[one]) == len(of_one) == 1024
        with unchanged(jobs), mounted(None, mountpoint, *options([base, one, two])):
            view = mountpoint / base.name
            assert wrong_blocks(view, *jobs[two]) == 0
            assert wrong_blocks(view, *jobs[one]) == len(of_one & of_two) > 0
            assert wrong_blocks(view, *jobs[base]) == len(of_one | of_two) < PAGES
        checked += len(of_one) + len(of_two) + PAGES
    seen(rounds=rounds, blocks_verified=checked)
