"""A directory of snapshots as a `Catalog`: each snapshot with its chain, or why it is broken.

Only metadata are read. No image file is opened.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from diffmergefs.core import STATUS_FOLDER, foreign
from diffmergefs.core.beneath import AllowedRoots
from diffmergefs.core.errors import BrokenChainError, DiffMergeError, FileAccessError
from diffmergefs.core.extents import MAX_LAYERS
from diffmergefs.core.layer import require_size
from diffmergefs.core.view import require_equal_size
from diffmergefs.stores.cloudhypervisor import CloudHypervisorReader, require_equal_ranges
from diffmergefs.stores.forkd import ForkdReader
from diffmergefs.stores.numbered import NumberedReader
from diffmergefs.stores.reader import Reader, Source, open_source
from diffmergefs.stores.snapshot import RECORDS, Snapshot, StoredFile, status_of
from diffmergefs.stores.superserve import SuperserveReader

_NAME_IS_TAKEN = (
    f"no tag can be called {STATUS_FOLDER!r}: in a mount it is the mount's own directory; rename it"
)
_NAMED = 8  # the number of tags of a cycle in its message

# A new layout is a line here. See docs/adding-a-store.md.
READERS: dict[str, Reader] = {
    reader.name: reader
    for reader in (ForkdReader(), NumberedReader(), SuperserveReader(), CloudHypervisorReader())
}
LAYOUTS = tuple(READERS)
#: Those that read no directory below the directories of the source.
SHALLOW_LAYOUTS = tuple(name for name, reader in READERS.items() if not reader.is_deep)


@dataclass(frozen=True)
class Catalog:
    """What a directory of snapshots held when it was read.

    `root` is the directory as given, `layout` the name of its reader, `snapshots` are by tag.
    """

    root: str
    layout: str
    snapshots: Mapping[str, Snapshot]
    _verdicts: dict[str, list[Snapshot] | DiffMergeError] = field(
        default_factory=dict, compare=False
    )
    _rejected: dict[str, str] = field(default_factory=dict, compare=False)

    def chain(self, tag: str) -> list[Snapshot]:
        """The snapshots whose layers make up `tag`, base first.

        Raises BrokenChainError or SizeMismatchError with the reason if metadata show that the image
        is not complete: a defect of its own, or of an ancestor.
        """
        if tag not in self._verdicts:
            try:
                self._verdicts[tag] = self._resolve(tag)
            except DiffMergeError as error:
                self._verdicts[tag] = error.anew()
        verdict = self._verdicts[tag]
        if isinstance(verdict, DiffMergeError):
            raise verdict.anew()
        return verdict

    def reachable(self, tag: str) -> list[Snapshot]:
        """The snapshots from `tag` down as far as parents can be followed, the lowest first.

        If `chain` succeeds, the same list. Otherwise what exists of it: each snapshot once, at most
        1,000. Empty if there is no such tag.
        """
        links: dict[str, Snapshot] = {}
        link = self.snapshots.get(tag)
        while link is not None and link.tag not in links and len(links) < MAX_LAYERS:
            links[link.tag] = link
            link = self.snapshots.get(link.parent) if link.parent else None
        return list(links.values())[::-1]

    def reject(self, tag: str, problem: str) -> None:
        """Mark `tag` as broken for a reason that this catalog alone does not show.

        Call it before the first `chain`, because results are kept.
        """
        self._rejected[tag] = problem

    def _resolve(self, tag: str) -> list[Snapshot]:
        links = resolve(tag, lambda name: self._sound(name, tag))
        base = links[0].layer
        require_size(base.path, base.key.size)
        for link in links[1:]:
            require_equal_size(base.path, base.key.size, link.layer.path, link.layer.key.size)
            _require_fit(links[0], link)
        return links

    def misfits(self, tag: str) -> Iterator[BrokenChainError]:
        """What is wrong with how the snapshots that `reachable` gives hang together.

        That is a parent that is missing, a cycle, and images of different parts of the guest's
        memory. It is neither a snapshot's own `problem` nor its layer's size.
        """
        try:
            resolve(tag, self.snapshots.get)
        except BrokenChainError as error:
            yield error
        links = self.reachable(tag)
        for link in links[1:]:
            try:
                _require_fit(links[0], link)
            except BrokenChainError as error:
                yield error

    def _sound(self, tag: str, head: str) -> Snapshot | None:
        # Its own defect, or the nearest ancestor's, explains more than what is missing below it.
        snapshot = self.snapshots.get(tag)
        problem = snapshot and (snapshot.problem or self._rejected.get(tag))
        if problem:
            where = "" if tag == head else f"ancestor '{tag}' is broken: "
            raise BrokenChainError(where + problem)
        return snapshot

    def recall(self, older: Catalog) -> None:
        """Take the layers of `older` for those snapshots whose layer is unknown now.

        Call it before the first use of `hidden` and `layer_files`.
        """
        for tag in (self.snapshots.keys() - self._layers.keys()) & older._layers.keys():
            self._layers[tag] = older._layers[tag]

    @cached_property
    def _layers(self) -> dict[str, StoredFile]:
        return {tag: s.memory for tag, s in self.snapshots.items() if s.memory}

    @cached_property
    def hidden(self) -> frozenset[str]:
        """Paths beneath the root that a mount never passes through: layers and their records."""
        layers = [layer.path for layer in self._layers.values()]
        paths = frozenset(path + suffix for path in layers for suffix in ("", *RECORDS))
        return paths.union(*(snapshot.withheld for snapshot in self.snapshots.values()))

    @cached_property
    def layer_files(self) -> frozenset[tuple[int, int]]:
        """Device and inode of each layer: a layer is not passed through under any name."""
        return frozenset(layer.key[:2] for layer in self._layers.values())


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """What a user accepts in a directory of snapshots.

    `allow_gaps` accepts numbered layers that leave numbers out, and the lowest of them as the base.
    `allow_outside` names directories beside the store in which its files may lie, if they are
    recorded there. The path of such a file is absolute.
    """

    allow_gaps: bool = False
    allow_outside: tuple[str, ...] = ()


def read_catalog(
    root: str,
    layout: str | None = None,
    suffix: str | None = None,
    at: int | None = None,
    options: StoreOptions | None = None,
) -> Catalog:
    """Read the directory `root`.

    `layout` names one of READERS and is detected by default. `suffix` (`.mem`) selects the memory
    files of a numbered directory. `at` is an open descriptor of `root`, if there is one.
    Reads names, sizes and JSON, never an image. Raises FileAccessError if `root` is not a readable
    directory, BrokenChainError if the directory as a whole is ambiguous, and ForeignFormatError if
    it is in a format that is declined.
    """
    options = options or StoreOptions()
    fd = open_source(root, at)
    try:
        with os.scandir(fd) as entries:
            statuses, refused = _statuses_of(entries)
        foreign.require_own_directory(statuses.keys() | refused.keys(), root)
        source = Source(
            root,
            AllowedRoots(fd, options.allow_outside),
            statuses,
            suffix,
            options.allow_gaps,
            refused,
        )
        reader = READERS[layout] if layout else _find_reader(source)
        snapshots = reader.read(source)
        if named := snapshots.get(STATUS_FOLDER):
            snapshots[STATUS_FOLDER] = replace(named, problem=_NAME_IS_TAKEN)
    except OSError as error:
        raise FileAccessError(f"{root}: {error.strerror} while it was read") from error
    finally:
        os.close(fd)
    return Catalog(root, reader.name, snapshots)


def _statuses_of(
    entries: Iterable[os.DirEntry[str]],
) -> tuple[dict[str, os.stat_result], dict[str, tuple[int, str]]]:
    # The lstat of each entry; and the entries that refuse it (another user's FUSE mount).
    statuses, refused = {}, {}
    for entry in entries:
        try:
            if status := status_of(entry):
                statuses[entry.name] = status
        except OSError as error:
            refused[entry.name] = _kind_of(entry), os.strerror(error.errno or 0)
    return statuses, refused


def _kind_of(entry: os.DirEntry[str]) -> int:
    # As the directory records it; 0 if it does not.
    try:
        if entry.is_dir(follow_symlinks=False):
            return stat.S_IFDIR
        return stat.S_IFREG if entry.is_file(follow_symlinks=False) else stat.S_IFLNK
    except OSError:
        return 0


def _find_reader(source: Source) -> Reader:
    found = [reader for reader in READERS.values() if reader.finds(source)]
    if len(found) > 1:
        names = [reader.name for reader in found]
        raise BrokenChainError(
            f"{source.path}: holds snapshots of several layouts ({', '.join(names)});"
            f" choose one with {' or '.join(f'--layout={name}' for name in names)}"
        )
    return found[0] if found else READERS["forkd"]


def _require_fit(base: Snapshot, link: Snapshot) -> None:
    if base.memory is not None and link.memory is not None:
        require_equal_ranges(base.memory.path, base.ranges, link.memory.path, link.ranges)


def resolve(head: str, lookup: Callable[[str], Snapshot | None]) -> list[Snapshot]:
    """The chain that ends in `head`, base first.

    `lookup` returns the snapshot of a tag, or None. Raises BrokenChainError for a missing parent, a
    cycle and a chain of more than 1,000 layers, naming the tags.
    """
    chain: list[Snapshot] = []
    seen: set[str] = set()
    tag: str | None = head
    while tag is not None:
        if tag in seen:
            tags = [link.tag for link in chain]
            raise BrokenChainError(_cycle(tags[tags.index(tag) :]))
        link = lookup(tag)
        if link is None:
            child = chain[-1].tag if chain else None
            of = f"parent '{tag}' of '{child}' is missing" if child else f"no snapshot '{tag}'"
            raise BrokenChainError(of)
        seen.add(tag)
        chain.append(link)
        if len(chain) > MAX_LAYERS:
            raise BrokenChainError(f"the chain has more than {MAX_LAYERS} layers; squash some")
        tag = link.parent
    return chain[::-1]


def _cycle(tags: list[str]) -> str:
    # Each tag is followed by its parent; the first is the parent of the last.
    more = [f"{len(tags) - _NAMED} more"] if len(tags) > _NAMED else []
    path = " -> ".join([*tags[:_NAMED], *more, tags[0]])
    return f"cycle: {path}, each followed by its parent; a chain ends in a base"
