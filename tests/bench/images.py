"""The images that are measured: one base, one set of dirty pages dealt in several ways."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.bench.measure import MIB, PAGE, NotMeasured, Scale, say
from tests.bench.programs import need, run

_SAMPLE = 512
_OLD_NS = 1_600_000_000_000_000_000


@dataclass(frozen=True)
class Chain:
    """A base and its diffs, oldest first."""

    base: Path
    diffs: tuple[Path, ...]

    @property
    def layers(self) -> tuple[Path, ...]:
        return (self.base, *self.diffs)

    @property
    def options(self) -> list[str]:
        """The command line's --base and --diff."""
        return [f"--base={self.base}", *(f"--diff={diff}" for diff in self.diffs)]


class Images:
    """The files of a scale, each made in `directory` when it is first asked for.

    No two dirty pages are neighbours, so that each is a segment of its own however they are dealt:
    all depths have the same segments, and the same bytes.
    """

    def __init__(self, directory: Path, scale: Scale) -> None:
        self.directory = directory
        self.scale = scale
        self._chains: dict[int, Chain] = {}

    @cached_property
    def dirty(self) -> list[int]:
        """The numbers of the dirty pages, in the order in which they are dealt."""
        even = range(0, self.scale.image // PAGE, 2)
        return random.Random(5).sample(even, self.scale.dirty_pages)

    @cached_property
    def base(self) -> Path:
        """The base: data throughout."""
        dice = random.Random(1)
        blocks = (dice.randbytes(MIB) for _ in range(self.scale.image // MIB))
        return write_file(self.directory / "base.img", blocks)

    def chain(self, depth: int) -> Chain:
        """The dirty pages dealt among `depth` diffs."""
        if depth not in self._chains:
            diffs = [
                self._diff(f"deep-{depth}-{n}", dict.fromkeys(self.dirty[n::depth], 0))
                for n in range(depth)
            ]
            self._chains[depth] = Chain(self.base, tuple(diffs))
        return self._chains[depth]

    @cached_property
    def heavy(self) -> Chain:
        """Eight diffs of as many pages each, as all the others have together."""
        diffs = [
            self._diff(f"heavy-{n}", dict.fromkeys(pages, n))
            for n, pages in enumerate(self._heavy_sets, 1)
        ]
        return Chain(self.base, tuple(diffs))

    @cached_property
    def _heavy_sets(self) -> list[list[int]]:
        # They overlap by chance; the content of layer 0 is that of the other chains' diffs.
        even = range(0, self.scale.image // PAGE, 2)
        return [random.Random(50 + n).sample(even, self.scale.dirty_pages) for n in range(8)]

    @cached_property
    def flat(self) -> Path:
        """The merged image as a plain file, made without any of the programs that are measured."""
        path = self.directory / "flat.img"
        dice = random.Random(1)
        write_file(path, (dice.randbytes(MIB) for _ in range(self.scale.image // MIB)))
        with path.open("r+b", buffering=0) as file:
            for page in self.dirty:
                os.pwrite(file.fileno(), content(page, 0), page * PAGE)
            os.fsync(file.fileno())
        return path

    @cached_property
    def overlay(self) -> Path:
        """A qcow2 image with clusters of a page over the raw base, which holds the dirty pages."""
        path = self.directory / "overlay.qcow2"
        image = need("qemu-img")
        backing: list[str | Path] = ["-b", self.flat, "-F", "raw"]
        run([image, "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", *backing, path])
        # A safe rebase writes just those clusters in which the old backing and the new one differ.
        run([image, "rebase", "-f", "qcow2", "-b", self.base, "-F", "raw", path])
        return path

    def verify(self, file: Path) -> str:
        """Compare a sample of what a server shows with what the layers hold; the sample's hash.

        NotMeasured where a byte differs.
        """
        return self._compare(file, dict.fromkeys(self.dirty, 0))

    def verify_heavy(self, file: Path) -> str:
        """The same for a view of `heavy`."""
        owner = {page: n for n, pages in enumerate(self._heavy_sets, 1) for page in pages}
        return self._compare(file, owner)

    def _compare(self, file: Path, owner: dict[int, int]) -> str:
        pages = self.scale.image // PAGE
        dice = random.Random(9)
        sample = {0, pages - 1, *dice.choices(range(pages), k=_SAMPLE)}
        sample.update(dice.choices(self.dirty, k=_SAMPLE))
        digest = hashlib.sha256()
        with file.open("rb", buffering=0) as shown, self.base.open("rb", buffering=0) as base:
            if os.fstat(shown.fileno()).st_size != self.scale.image:
                raise NotMeasured(f"{file} has not the image's size")
            for page in sorted(sample):
                layer = owner.get(page)
                wanted = os.pread(base.fileno(), PAGE, page * PAGE)
                if layer is not None:
                    wanted = content(page, layer)
                if os.pread(shown.fileno(), PAGE, page * PAGE) != wanted:
                    raise NotMeasured(f"{file} shows wrong bytes at {page * PAGE}")
                digest.update(wanted)
        return digest.hexdigest()

    def _diff(self, name: str, pages: dict[int, int]) -> Path:
        return write_diff(self.directory / f"{name}.diff", self.scale.image, pages)


def content(page: int, layer: int) -> bytes:
    """What a diff holds in a page: never what the base does, nor another layer."""
    return f"layer {layer:6} page {page:12}\n".encode().ljust(32, b".") * (PAGE // 32)


def write_file(path: Path, blocks: Iterable[bytes]) -> Path:
    """A file of these blocks, on the disk."""
    with path.open("wb", buffering=0) as file:
        for block in blocks:
            file.write(block)
        os.fsync(file.fileno())
    return aged(path)


def write_diff(path: Path, size: int, pages: dict[int, int]) -> Path:
    """A sparse file of these pages, each with the `content` of its layer, on the disk."""
    with path.open("wb", buffering=0) as file:
        file.truncate(size)
        for page in sorted(pages):
            os.pwrite(file.fileno(), content(page, pages[page]), page * PAGE)
        os.fsync(file.fileno())
    return aged(path)


def aged(path: Path) -> Path:
    """The file, its mtime long past: one modified a moment ago is looked at twice by a mount."""
    os.utime(path, ns=(_OLD_NS, _OLD_NS))
    return path


@dataclass(frozen=True)
class Store:
    """A directory of snapshots (forkd's layout): a base, and chains of four diffs over it."""

    directory: Path
    tags: tuple[str, ...]
    tips: tuple[str, ...]
    """The newest snapshot of each whole chain."""


def write_store(directory: Path, scale: Scale) -> Store:
    """As many snapshots as the scale says. The base's data are a 32nd of it.

    No two dirty pages of a chain are neighbours: its segments are twice its diffs' extents.
    """
    say(f"    writing {scale.snapshots} snapshots")
    size, count = scale.snapshot_size, scale.dirty_pages
    tags = ["base"]
    base = _folder(directory, "base", None) / "memory.bin"
    dice = random.Random(2)
    with base.open("wb", buffering=0) as file:
        file.truncate(size)
        for at in range(0, size, 32 * MIB):
            os.pwrite(file.fileno(), dice.randbytes(MIB), at)
    aged(base)
    places = range(0, size // PAGE, 8)
    for number in range(scale.snapshots - 1):
        chain, step = divmod(number, 4)
        parent = f"chain{chain}-{step - 1}" if step else "base"
        tags.append(f"chain{chain}-{step}")
        pages = {place + 2 * step: step for place in dice.sample(places, min(count, len(places)))}
        write_diff(_folder(directory, tags[-1], parent) / "memory.bin", size, pages)
    tips = tuple(tag for tag in tags if tag.endswith("-3"))
    return Store(directory, tuple(tags), tips or (tags[-1],))


def _folder(store: Path, tag: str, parent: str | None) -> Path:
    folder = store / tag
    folder.mkdir(parents=True)
    document = {"memory": "memory.bin", "vmstate": "vmstate"}
    if parent:
        document["parent_tag"] = parent
    for name, text in {"snapshot.json": json.dumps(document), "vmstate": "state"}.items():
        (folder / name).write_text(text, encoding="utf-8")
        aged(folder / name)
    return folder


def total_size(paths: Sequence[Path]) -> int:
    """Bytes of data that the files hold."""
    return sum(path.stat().st_blocks * 512 for path in paths)
