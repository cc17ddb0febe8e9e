"""Random input for the readers of other people's stores: presence files, state.json, directories.

The counts are those of `make soak`; `make test` runs a small share.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffmergefs.core.beneath import AllowedRoots
from diffmergefs.core.errors import (
    BrokenChainError,
    DiffMergeError,
    PresenceError,
)
from diffmergefs.core.extents import ExtentList
from diffmergefs.opening.images import open_snapshot
from diffmergefs.opening.opener import LayerPool
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.sidecars.presence import parse as parse_presence
from diffmergefs.stores.catalog import read_catalog
from diffmergefs.stores.snapshot import Snapshot
from tests.support import trees
from tests.support.cloudhypervisor import state
from tests.support.fuzzing import (
    SECRET_LAYER,
    FilledDiff,
    Guard,
    ground,
    inputs,
    require_one_line,
)
from tests.support.images import PAGE, write_layer
from tests.support.maps import mutated
from tests.support.superserve import crc64, presence
from tests.support.trees import OUTSIDE, STORE, Entry, Other, Sparse

__all__ = ["ground"]

_GOOD = st.builds(presence, st.sets(st.integers(0, 3)), st.just(4))
_CHECKED = st.builds(
    lambda magic, page, count, words: (
        magic + b"".join(n.to_bytes(8, "little") for n in (page, count, *words))
    ),
    st.sampled_from([b"FCPRSNC1", b"FCPRSNC1", b"FCPRSNC1", b"FCPRSNC2"]),
    st.sampled_from(
        [PAGE, PAGE, PAGE, 0, 1, 512, 2 * PAGE, 4 * PAGE, PAGE + 1, 1 << 61, 1 << 62, 1 << 63]
    ),
    st.sampled_from([4, 4, 4, 0, 1, 2, 3, 5, 32, 64, 65, 1 << 40, (1 << 64) - 1]),
    st.lists(st.integers(0, 15) | st.integers(0, (1 << 64) - 1), max_size=3),
).map(lambda body: body + crc64(body).to_bytes(8, "little"))
_PRESENCES = st.one_of(_GOOD, _CHECKED, _GOOD.flatmap(mutated))


@pytest.mark.parametrize(
    ("drawn", "full"),
    [(_PRESENCES, 10_000), (st.binary(max_size=100), 2_500)],
    ids=["files", "bytes"],
)
def test_presence_files(
    drawn: st.SearchStrategy[bytes],
    full: int,
    soak: bool,
    seen: Callable[..., None],
    ground: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Random presence files beside a diff"""

    def parse(data: bytes) -> ExtentList:
        return parse_presence(data, "diff.presence").extents

    filled = FilledDiff(ground / "layers", ".presence", parse, PresenceError, monkeypatch)

    @inputs(full, soak)
    @given(data=drawn)
    def check(data: bytes) -> None:
        filled.examine(data)

    check()
    seen(**filled.met)
    assert full < 10_000 or all(filled.met.values()), filled.met


_BASES = [
    f"{STORE}/templates/t/mem.snap",
    f"{STORE}/templates/t/mem.snap\n",
    f"{STORE}/a/mem.diff",
    f"{STORE}/b/mem.diff",
    f"{STORE}/a/lone",
    f"{STORE}/a",
    f"{STORE}",
    f"{STORE}/fifo",
    f"{STORE}/link/secret",
    f"{OUTSIDE}/secret",
    f"{STORE}/../outside/secret",
    "/dev/zero",
    "/proc/self/fd/0",
    "mem.snap",
    "",
    "/",
    "/a\0b",
    "/\udcff\n/x",
]
_RECORDS = st.one_of(
    st.sampled_from(_BASES[:3]).map(os.fsencode),
    st.sampled_from(_BASES).map(os.fsencode),
    st.binary(max_size=20),
)


def _sandbox(held: frozenset[int], base: bytes, bits: bytes) -> dict[str, Entry]:
    return {
        "mem.diff": Sparse(4, held),
        "mem.diff.base": Other("text", base),
        "mem.diff.presence": Other("text", bits),
    }


_HELD = st.frozensets(st.integers(0, 3))
_SANDBOX = st.one_of(
    _HELD.flatmap(
        lambda held: st.builds(_sandbox, st.just(held), _RECORDS, st.just(presence(held, 4)))
    ),
    st.builds(_sandbox, _HELD, _RECORDS, st.one_of(_PRESENCES, st.just(b""), st.just(b"U"))),
)
_ODD = st.sampled_from(
    [
        Sparse(4),
        Sparse(5, frozenset({1})),
        Other("fifo"),
        Other("symlink", f"{OUTSIDE}/secret"),
        Other("symlink", f"{STORE}/templates/t/mem.snap"),
        Other("symlink", ".."),
        {},
    ]
)
_HARM = st.dictionaries(
    st.sampled_from(
        ["mem.snap", "mem.diff", "mem.diff.base", "mem.diff.presence", "lone", "snapshot.json"]
    ),
    _ODD,
    max_size=1,
)
_FOLDER: st.SearchStrategy[Any] = st.builds(lambda whole, harm: {**whole, **harm}, _SANDBOX, _HARM)
_SUPERSERVE = st.builds(
    lambda template, folders, more: {"templates": {"t": template}, **more, **folders},
    st.builds(lambda harm: {"mem.snap": Sparse(4, frozenset(range(4))), **harm}, _HARM),
    st.dictionaries(
        st.sampled_from(["a", "b", "c", "templates+t", "a+lone"]),
        st.one_of(_FOLDER, _FOLDER, _FOLDER.map(lambda inner: {"snap": inner}), _ODD),
        min_size=1,
        max_size=3,
    ),
    st.dictionaries(st.sampled_from(["fifo", "link", "loose"]), _ODD, max_size=1),
)


def test_superserve_directories(
    soak: bool, seen: Callable[..., None], ground: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random directories of superserve's"""
    numbers = itertools.count()
    (ground / "store").mkdir()
    guard = Guard([ground / "store"], monkeypatch)
    policy = TrustPolicy(verify="no")  # nothing is remembered
    secret = (ground / "outside" / "secret").stat().st_ino
    met = {"inputs": 0, "refused": 0, "broken": 0, "unopened": 0, "views": 0}

    @inputs(10_000, soak)
    @given(contents=_SUPERSERVE)
    def check(contents: Mapping[str, Any]) -> None:
        met["inputs"] += 1
        store = ground / "store" / str(next(numbers))
        made = trees.Made({secret: trees.signed_pages(SECRET_LAYER, range(4))})
        places = {STORE: str(store), OUTSIDE: str(ground / "outside")}
        trees.make(store, contents, places, made)
        try:
            with guard.on_duty():
                examine(store, made)
        finally:
            shutil.rmtree(store)

    def examine(store: Path, made: trees.Made) -> None:
        try:
            catalog = read_catalog(str(store), "superserve")
        except DiffMergeError as error:
            require_one_line(error)
            met["refused"] += 1
            return
        root = os.open(store, os.O_PATH | os.O_DIRECTORY)
        try:
            pool = LayerPool(AllowedRoots(root), policy, catalog.root)
            for tag in catalog.snapshots:
                try:
                    links = catalog.chain(tag)
                except DiffMergeError as error:
                    require_one_line(error)
                    met["broken"] += 1
                    continue
                examine_chain(store, links, pool, made)
        finally:
            os.close(root)

    def examine_chain(
        store: Path, links: list[Snapshot], pool: LayerPool, made: trees.Made
    ) -> None:
        assert secret not in [link.layer.key.inode for link in links]
        for link in links[1:]:
            recorded = made.layers[os.stat(store / f"{link.layer.path}.base").st_ino][0]
            below = links[links.index(link) - 1].layer.path
            assert recorded.strip() == os.fsencode(store / below)
        try:
            image = open_snapshot(links, pool, policy)
        except DiffMergeError as error:
            require_one_line(error)
            met["unopened"] += 1
            return
        met["views"] += 1
        for page in range(min(4, image.view.size // PAGE)):
            assert image.view.read(page * PAGE, PAGE) == expected(store, links, made, page)

    def expected(store: Path, links: list[Snapshot], made: trees.Made, page: int) -> bytes:
        found = made.layers[links[0].layer.key.inode].get(page, bytes(PAGE))
        for link in links[1:]:
            record = os.stat(store / f"{link.layer.path}.presence").st_ino
            (start,) = (int.from_bytes(made.layers[record][0][24:32], "little"),)
            if start >> page & 1:
                found = made.layers[link.layer.key.inode].get(page, bytes(PAGE))
        return found

    check()
    seen(**met, opens_watched=guard.opened)
    assert all(met[what] for what in ("broken", "unopened", "views")), met


_STATE = json.dumps(state([(0, 2 * PAGE), (1 << 32, 2 * PAGE)]))
_NUMBERS: st.SearchStrategy[object] = st.sampled_from(
    [0, 1, PAGE, 2 * PAGE, 4 * PAGE, 1 << 32, -1, 1 << 64, 1 << 200, 1.5, True, None, "0", []]
)
_TABLES: st.SearchStrategy[Any] = st.one_of(
    st.lists(st.fixed_dictionaries({"gpa": _NUMBERS, "length": _NUMBERS}), max_size=3),
    st.lists(st.tuples(_NUMBERS, _NUMBERS), max_size=2),
    _NUMBERS,
)
_MANAGERS = st.one_of(
    _TABLES.map(lambda table: {"data": table}), _TABLES, st.dictionaries(st.text(), _TABLES)
)
_STATES = st.one_of(
    _MANAGERS.map(lambda ranges: json.dumps(state(memory_ranges=ranges)).encode()),
    mutated(_STATE.encode()),
    st.binary(max_size=100),
    st.just(_STATE.encode()),
)


def test_states(
    soak: bool, seen: Callable[..., None], ground: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random state.json of Cloud Hypervisor"""
    store = ground / "store"
    for tag, parent in (("base", None), ("work", "base")):
        (store / tag).mkdir(parents=True)
        write_layer(store / tag / "memory-ranges", 4 * PAGE, [])
        document = {"memory": "memory-ranges", "parent_tag": parent}
        (store / tag / "snapshot.json").write_text(json.dumps(document))
        (store / tag / "state.json").write_text(_STATE)
    guard = Guard([store], monkeypatch)
    met = {"inputs": 0, "complete": 0, "broken": 0}

    @inputs(10_000, soak)
    @given(text=_STATES)
    def check(text: bytes) -> None:
        met["inputs"] += 1
        (store / "work" / "state.json").write_bytes(text)
        with guard.on_duty():
            catalog = read_catalog(str(store))
        assert len(catalog.chain("base")) == 1
        try:
            links = catalog.chain("work")
        except BrokenChainError as error:
            require_one_line(error)
            met["broken"] += 1
            return
        met["complete"] += 1
        assert links[0].ranges == links[1].ranges == ((0, 2 * PAGE), (1 << 32, 2 * PAGE))
        manager = json.loads(text)["snapshots"]["memory-manager"]["snapshot_data"]["state"]
        listed = json.loads(manager)["memory_ranges"]["data"]
        assert [(entry["gpa"], entry["length"]) for entry in listed] == list(links[1].ranges)

    check()
    seen(**met)
    assert all(met.values()), met
