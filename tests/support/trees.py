"""Random directories of snapshots, as hypothesis draws them and as they stand on a disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.support.images import PAGE, signed
from tests.support.maps import mutated

#: What stands for the store's own path, and for that of the directory beside it, in a drawn text.
STORE, OUTSIDE = "{store}", "{outside}"

_PATHS = [
    "memory.bin",
    "./memory.bin",
    "vmstate",
    "inner/memory.bin",
    f"{STORE}/a/memory.bin",
    f"{STORE}/shared/big.mem",
    f"//{STORE}//shared/./big.mem",
    f"{STORE}/a/../b/memory.bin",
    f"{STORE}/link/secret",
    f"{STORE}",
    f"{OUTSIDE}/secret",
    f"{OUTSIDE}-2/secret",
    "/gone/memory.bin",
    "/etc/passwd",
    "/dev/zero",
    "/proc/self/fd/0",
    "../b/memory.bin",
    "..",
    ".",
    "",
    "snapshot.json",
    "fifo",
    "a\0b",
    "x" * 300,
    "x/" * 3000,
    "\udcff",
    "\ud800",
    "a\nb",
]
_TAGS = ["a", "b", "c", "d", "gone", "", "..", "a/b", "a\nb", "x" * 65, "\0", "\ud800"]
_HASHES = ["0" * 64, "A" * 64, "0" * 63, "g" * 64, ""]
_NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.integers(1, 2000).map(lambda n: 10**n),
    st.booleans(),
    st.none(),
)
_ODD = st.recursive(
    st.one_of(_NUMBERS, st.text(max_size=8), st.sampled_from(_PATHS)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
_FIELDS = {
    "memory": st.sampled_from(_PATHS),
    "vmstate": st.sampled_from(_PATHS),
    "parent_tag": st.sampled_from(_TAGS),
    "parent_content_hash": st.sampled_from(_HASHES),
    "volumes": _ODD,
}
_SANE = st.fixed_dictionaries(
    {"memory": st.sampled_from(["memory.bin", f"{STORE}/shared/big.mem", f"{OUTSIDE}/secret"])},
    optional={
        "parent_tag": st.sampled_from(["a", "b", "c", "d"]),
        "vmstate": st.just("vmstate"),
        "parent_content_hash": st.just("0" * 64),
    },
)
_WRONG = st.fixed_dictionaries(
    {}, optional={name: value | _ODD for name, value in _FIELDS.items()} | {"x": _ODD}
)

#: The value of a snapshot.json: most often one with sense in it, sometimes none at all.
documents = st.one_of(_SANE, _SANE, _WRONG, _ODD)

#: The bytes of a snapshot.json: written from a value and then cut, doubled or overwritten.
texts = documents.map(lambda value: json.dumps(value).encode()).flatmap(mutated)


@dataclass(frozen=True)
class Sparse:
    """A file of `pages` pages, of which it holds `data`; `more` bytes follow."""

    pages: int
    data: frozenset[int] = frozenset()
    more: int = 0


@dataclass(frozen=True)
class Other:
    """A 'fifo', 'symlink' to `target`, 'hardlink' to `target`, or 'text' of it."""

    kind: str
    target: str | bytes = ""


Entry = Sparse | Other | Mapping[str, Any]

_SIZES = st.sampled_from([4, 4, 4, 4, 4, 4, 0, 3, 5, 1 << 32, (1 << 51) - 1])
_SPARSE = st.builds(
    Sparse,
    _SIZES,
    st.frozensets(st.integers(0, 3), max_size=4),
    st.sampled_from([0, 0, 0, 0, 100]),
)
_TARGETS = st.sampled_from(
    ["..", "/etc/passwd", "memory.bin", "a", "loop", OUTSIDE, f"{OUTSIDE}/secret", STORE, "fifo"]
)
_ODD_FILE = st.one_of(
    st.builds(Other, st.just("fifo")),
    st.builds(Other, st.just("symlink"), _TARGETS),
    st.builds(Other, st.just("hardlink"), st.just(f"{OUTSIDE}/secret")),
    st.builds(Other, st.just("text"), st.binary(max_size=16)),
)
_FILE = st.one_of(_SPARSE, _SPARSE, _SPARSE, _ODD_FILE)
_DOCUMENT = st.one_of(
    documents.map(lambda value: Other("text", json.dumps(value).encode())),
    st.builds(Other, st.just("text"), texts),
    _ODD_FILE,
)
_HARD_NAMES = st.sampled_from(
    ["a\nb", "\udcff", "x" * 255, "-rf", " ", "~", ".hidden", "memory.bin.bmap", "fifo", "loop"]
)
_TAG_FOLDER = st.builds(
    lambda fixed, more: {**more, **fixed},
    st.fixed_dictionaries(
        {"memory.bin": _FILE},
        optional={"snapshot.json": _DOCUMENT, "vmstate": _FILE, "inner": st.just({})},
    ),
    st.dictionaries(_HARD_NAMES, _FILE | st.just({}), max_size=2),
)
_TAG_NAMES = st.sampled_from(["shared", ".compact-staging-a", "a b", "x" * 65])
_FORKD = st.dictionaries(
    st.sampled_from("abcd") | st.sampled_from("abcd") | _TAG_NAMES | _HARD_NAMES,
    st.one_of(_TAG_FOLDER, _TAG_FOLDER, _TAG_FOLDER, st.just({"big.mem": Sparse(4)}), _ODD_FILE),
    max_size=4,
)
_FILLED = st.just(Other("text", bytes(4 * PAGE)))  # as a diff, one whose holes were filled
_GOOD = st.builds(Sparse, st.just(4), st.frozensets(st.integers(0, 3)))
_LAYER = st.one_of(_GOOD, _GOOD, _GOOD, _FILLED)
_NUMBERED_NAMES = st.builds(
    lambda number, stem, suffix: f"{number}-{stem}{suffix}",
    st.sampled_from(["0", "000", "1", "001", "01", "2", "10", "9" * 40, "٣"]),
    st.sampled_from(["base", "a", "b", "a.b", "a\nb", "\udcff", "..", ".", ""]),
    st.sampled_from([".mem", ".mem", ".mem", ".img", ".bin", ".mem.bmap", ".mem.tmp", ".x", ""]),
)
_NUMBERED = st.dictionaries(_NUMBERED_NAMES | _HARD_NAMES, _FILE, max_size=4)


def _forkd_chain(layers: Sequence[Entry]) -> dict[str, Entry]:
    parents = [None, *"abc"]
    return {
        tag: {"memory.bin": layer, "snapshot.json": Other("text", _document(parent))}
        for tag, parent, layer in zip("abcd", parents, layers, strict=False)
    }


def _document(parent: str | None) -> bytes:
    return json.dumps({"memory": f"{STORE}/gone/memory.bin", "parent_tag": parent}).encode()


def _numbered_chain(layers: Sequence[Entry]) -> dict[str, Entry]:
    names = ["000-base.mem", "001-a.mem", "002-b.mem", "010-c.mem"]
    return dict(zip(names, layers, strict=False))


def _merged(one: Mapping[str, Entry], other: Mapping[str, Entry]) -> dict[str, Entry]:
    found = {**one, **other}
    for name in one.keys() & other.keys():
        mine, theirs = one[name], other[name]
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            found[name] = {**mine, **theirs}
    return found


_CHAIN = st.lists(_LAYER, min_size=1, max_size=4)

#: The contents of a directory of snapshots: a good chain and what was done to it, or a mixture.
layouts = st.one_of(
    st.builds(_merged, _CHAIN.map(_forkd_chain), _FORKD),
    st.builds(_merged, _CHAIN.map(_numbered_chain), _NUMBERED),
    st.builds(_merged, _FORKD, _NUMBERED),
)


@dataclass
class Made:
    """What stands on the disk: for each inode the pages that it holds, by their number."""

    layers: dict[int, Mapping[int, bytes]] = field(default_factory=dict)

    def page(self, chain: Sequence[int], page: int) -> bytes:
        """What a chain of these inodes, base first, must show of a page."""
        found = [self.layers[inode][page] for inode in chain if page in self.layers[inode]]
        return found[-1] if found else bytes(PAGE)


def signed_pages(number: int, pages: Iterable[int]) -> dict[int, bytes]:
    """These pages of the layer of this number."""
    return {page: signed(number, page * PAGE, PAGE) for page in pages}


def make(
    folder: Path, contents: Mapping[str, Entry], places: Mapping[str, str], made: Made
) -> None:
    """Write the contents into a new directory; `places` says what STORE and OUTSIDE are."""
    folder.mkdir()
    for name, entry in contents.items():
        path = folder / name
        if isinstance(entry, Sparse):
            _write_sparse(path, entry, made)
        elif isinstance(entry, Other):
            _write_other(path, entry, places, made)
        else:
            make(path, entry, places, made)


def _write_sparse(path: Path, entry: Sparse, made: Made) -> None:
    size = entry.pages * PAGE + entry.more
    inside = (page for page in entry.data if (page + 1) * PAGE <= size)
    data = signed_pages(len(made.layers) + 1, inside)
    with path.open("xb", buffering=0) as file:
        file.truncate(size)
        for page, text in data.items():
            os.pwrite(file.fileno(), text, page * PAGE)
        made.layers[os.fstat(file.fileno()).st_ino] = data


def _write_other(path: Path, entry: Other, places: Mapping[str, str], made: Made) -> None:
    if entry.kind == "fifo":
        os.mkfifo(path)
    elif isinstance(entry.target, bytes):
        text = placed(entry.target, places)
        path.write_bytes(text)
        parts = range(0, len(text), PAGE)
        made.layers[path.stat().st_ino] = {n // PAGE: text[n : n + PAGE] for n in parts}
    elif entry.kind == "symlink":
        path.symlink_to(os.fsdecode(placed(entry.target.encode(), places)))
    else:
        os.link(os.fsdecode(placed(entry.target.encode(), places)), path)


def placed(text: bytes, places: Mapping[str, str]) -> bytes:
    """The text with the real paths in it."""
    for name, path in places.items():
        text = text.replace(name.encode(), path.encode())
    return text
