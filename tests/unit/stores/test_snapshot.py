"""How a snapshot's document is read: its limits, and a file that changes meanwhile."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from diffmergefs.core.errors import BrokenChainError
from diffmergefs.core.identity import FileKey
from diffmergefs.stores.catalog import read_catalog
from diffmergefs.stores.snapshot import (
    MAX_PARTS,
    Snapshot,
    StoredFile,
    load_document,
    parse_document,
)
from tests.support.stores import (
    write_document,
)
from tests.support.subjects.hostile import problem, store

__all__ = ["store"]


def test_a_document_at_its_limits_is_taken_and_can_be_written_again(store: Path) -> None:
    deep: object = 7
    for _ in range(61):
        deep = [deep]
    odd = {"x": deep, "n": int("9" * 1000), "f": 1e308, "é": "😀"}
    fields = {"memory": "memory.bin", "volumes": odd}
    text = json.dumps(fields)
    write_document(store, "base", text + " " * ((1 << 20) - len(text)))
    document = read_catalog(str(store)).chain("base")[0].document
    assert document == fields
    assert json.loads(json.dumps(document)) == fields
    write_document(store, "base", text + " " * ((1 << 20) - len(text) + 1))
    assert "too large" in problem(store)


def test_a_document_that_changes_while_it_is_read_is_refused(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fstat, seen = store / "base" / "snapshot.json", os.fstat, []

    def status(fd: int) -> os.stat_result:
        if os.readlink(f"/proc/self/fd/{fd}") == str(path):
            seen.append(fd)
            if len(seen) == 3:  # beneath's check, before and after the read
                write_document(store, "base", "{}")
        return fstat(fd)

    root = os.open(store, os.O_PATH)
    monkeypatch.setattr(os, "fstat", status)
    try:
        with pytest.raises(BrokenChainError, match="changed while it was read"):
            load_document(root, "base/snapshot.json")
    finally:
        os.close(root)


def test_a_sparse_document_of_a_terabyte_is_refused_by_its_first_mebibyte(store: Path) -> None:
    os.truncate(store / "base" / "snapshot.json", 1 << 40)
    assert "too large for a snapshot.json" in problem(store)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"a": NaN}', "NaN is not JSON"),
        (b"[1]", "holds a list, not a JSON object"),
        (b'{"a": {"b": 1, "b": 1}}', "the key 'b' appears twice"),
        (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "nested more than 64 deep"),
        (b'{"a": [1, 2, 3, 4]}', "over 5 strings, objects, arrays and commas"),
    ],
    ids=["constant", "no object", "twice", "deep", "parts"],
)
def test_a_text_beyond_the_limits_is_refused_with_its_path(text: bytes, reason: str) -> None:
    with pytest.raises(BrokenChainError) as caught:
        parse_document(text, "x/snapshot.json", 5 if "over" in reason else MAX_PARTS)
    assert str(caught.value).startswith("x/snapshot.json: ")
    assert reason in str(caught.value)


def test_strings_and_commas_count_but_not_what_is_in_a_string() -> None:
    text = b'{"a,b[{": "x\\"[,", "c": 2}'
    assert parse_document(text, "x", 5) == {"a,b[{": 'x"[,', "c": 2}
    with pytest.raises(BrokenChainError, match="over 4 "):
        parse_document(text, "x", 4)


def test_a_snapshot_is_as_new_as_the_newest_of_its_files() -> None:
    def key(mtime_ns: int) -> FileKey:
        return FileKey(1, 2, 3, mtime_ns)

    memory = StoredFile("t/m", key(5), frozenset({(".bmap", key(7))}))
    found = Snapshot("t", memory=memory, documents={"t/d": key(6)}, device_state={"t/v": None})
    assert found.newest_ns == 7
    assert found.state == {("t/m", key(5)), ("t/m.bmap", key(7)), ("t/d", key(6)), ("t/v", None)}
    assert Snapshot("t").newest_ns == 0
