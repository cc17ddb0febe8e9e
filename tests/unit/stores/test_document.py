"""Hostile snapshots: files of every kind, documents of every kind, and names."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffmergefs.core.errors import BrokenChainError, FileAccessError
from diffmergefs.fuse.served import Store
from diffmergefs.opening.images import open_image
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.stores.catalog import read_catalog
from tests.support.commands import mistake, succeed
from tests.support.stores import (
    OLD_NS,
    SECOND_NS,
    write_document,
    write_numbered,
    write_tag,
)
from tests.support.subjects.hostile import problem, store

__all__ = ["store"]


@pytest.mark.parametrize("kind", ["fifo", "directory", "symlink", "socket"])
@pytest.mark.parametrize("name", ["snapshot.json", "memory.bin"])
def test_what_is_no_regular_file_breaks_its_tag_and_is_not_opened(
    store: Path, kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store / "base" / name
    path.rename(store / "real")
    with socket.socket(socket.AF_UNIX) as server:
        if kind == "fifo":
            os.mkfifo(path)  # without a writer: an open for reading would wait for ever
        elif kind == "directory":
            path.mkdir()
        elif kind == "symlink":
            path.symlink_to("../real")
        else:
            monkeypatch.chdir(path.parent)
            server.bind(name)
        assert "regular file" in problem(store)
        assert "regular file" in mistake(3, "info", store / "base")


def test_a_diff_whose_document_cannot_be_seen_is_no_base(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tag(store, "work", "base", layer=1)
    real = os.stat

    def status(path: str, **options: Any) -> os.stat_result:
        if path == "snapshot.json" and failing and failing.pop():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, **options)

    monkeypatch.setattr(os, "stat", status)
    # A tag whose first or second look at its document fails is broken, never a base.
    for count in range(1, 4):
        failing = [True] * count
        found = read_catalog(str(store), "forkd").snapshots
        assert set(found) == {"base", "fine", "work"}
        assert found["work"].parent == "base" or found["work"].problem == "work: Input/output error"
    assert all(snapshot.problem for snapshot in found.values())


def test_source_itself_may_be_no_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(FileAccessError, match="a file, not a directory of snapshots"):
        read_catalog(str(tmp_path / "fifo"))
    assert "not a regular file" in mistake(14, "info", "--base", tmp_path / "fifo")


MEMORY = '"memory": "memory.bin"'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f'{{{MEMORY}, "x": {"9" * 1001}}}', "a number of 1001 digits"),
        (f'{{{MEMORY}, "x": {"9" * 5000}}}', "a number of 5000 digits"),
        (f'{{{MEMORY}, "x": 1e999}}', "the number 1e999 is beyond the range of a float"),
        (f'{{{MEMORY}, "x": -{"9" * 900}.5}}', "is beyond the range of a float"),
        (f'{{{MEMORY}, "x": ["\\udc80"]}}', "surrogates not allowed"),
        (f'{{{MEMORY}, "\\ud800": 1}}', "surrogates not allowed"),
        (f"\ufeff{{{MEMORY}}}", "BOM"),
        (f"{{{MEMORY}}}".encode("utf-16"), "'utf-8' codec can't decode"),
        (f'{{{MEMORY}, "x": "\ud800"}}'.encode("utf-8", "surrogatepass"), "can't decode"),
        (f'{{{MEMORY}, "x": "a\nb"}}', "Invalid control character"),
        ("\0" * 100, "not valid JSON"),
        (b"\x7fELF" + bytes(4096), "not valid JSON"),
        (json.dumps({"memory": "x" * 4097}), "'memory' has 4097 characters"),
        (json.dumps({"memory": "x" * 300}), "File name too long"),
        (json.dumps({"memory": "/".join(["x"] * 2000)}), "is neither in 'base'"),
        (json.dumps({"memory": "memory.bin", "parent_tag": "x" * 9999}), "has 9999 characters"),
        (json.dumps({"memory": "memory.bin", "parent_tag": "a\nb"}), r"parent 'a\nb' of"),
        (json.dumps({"memory": "memory.bin", "parent_tag": "\x1b[2J"}), r"parent '\x1b[2J' of"),
        (json.dumps({"memory": "memory.bin", "parent_tag": "../fine"}), "'../fine' of"),
        (json.dumps({"memory": "memory.bin", "parent_tag": "a\u2028b"}), r"'a\u2028b'"),
        (json.dumps({"memory": True}), "'memory' is a bool"),
        (json.dumps({"memory": {"path": "memory.bin"}}), "'memory' is a dict"),
        (
            json.dumps({"memory": "snapshot.json"}),
            "snapshot.json and 'memory' have the same name",
        ),
        (
            json.dumps({"memory": "memory.bin", "vmstate": "snapshot.json"}),
            "its own snapshot.json and 'vmstate' have the same name",
        ),
        (json.dumps({"memory": "."}), "is not a regular file"),
        (json.dumps({"memory": "/"}), "does not name a file"),
        (json.dumps({"memory": "memory.bin\0.png"}), "does not name a file"),
        (json.dumps({"memory": "memory.bin", "vmstate": "snapshot.json/x"}), "is neither in"),
    ],
)
def test_hostile_documents(store: Path, text: str | bytes, reason: str) -> None:
    write_document(store, "base", text)
    assert reason in problem(store)
    state = json.loads(succeed("list", "--json", store))[0]
    assert (state["tag"], state["state"]) == ("base", "broken")


def test_a_key_that_stands_twice_at_the_end_of_many_is_found_at_once(store: Path) -> None:
    # Comparing each with each would take long.
    keys = ",".join(f'"{n:x}":1' for n in range(16_000))
    text = f'{{{MEMORY},{keys},"{"long" * 30}":1,"{"long" * 30}":1}}'
    assert len(text) < 1 << 20
    write_document(store, "base", text)
    assert "'longlong" in problem(store) and "appears twice" in problem(store)


def test_names_that_the_locale_cannot_write_are_refused(store: Path) -> None:
    write_document(store, "base", json.dumps({"memory": "naïve"}))
    code = "import sys; from diffmergefs.stores import catalog\n"
    code += "print(ascii(catalog.read_catalog(sys.argv[1]).snapshots['base'].problem))"
    environment = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(store)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "which is not text" in done.stdout


def test_a_name_forges_no_line_of_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tag(tmp_path, "x\n2030-01-01 INFO all is well\x1b[2J")
    store = Store(str(tmp_path), TrustPolicy(), clock=lambda: OLD_NS + 100 * SECOND_NS)
    store.look()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and "\n" not in lines[0] and "\x1b" not in lines[0]
    assert lines[0].startswith(r"x\n2030-01-01 INFO all is well\x1b[2J: not shown: ")


def test_a_broken_neighbour_does_not_hide_a_numbered_image(tmp_path: Path) -> None:
    write_numbered(tmp_path, ["000-base.mem", "002-leaf.mem"])
    (tmp_path / "001-a.mem").symlink_to("000-base.mem")
    with open_image(tmp_path / "000-base.mem").view as view:
        assert len(view.layers) == 1
    with pytest.raises(BrokenChainError, match=r"001-a\.mem: is not a regular file"):
        open_image(tmp_path / "002-leaf.mem")
    (tmp_path / "notes.mem").touch()
    with pytest.raises(FileAccessError, match="neither a snapshot directory nor"):
        open_image(tmp_path / "notes.mem")
