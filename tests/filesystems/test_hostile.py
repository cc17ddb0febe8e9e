"""Hostile stores that only root can set up: devices, and files of other users."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from tests.support.commands import diffmergefs_as_nobody, mistake
from tests.support.stores import write_chain, write_document, write_tag
from tests.support.subjects.hostile import problem, store

__all__ = ["store"]

MEMORY = '"memory": "memory.bin"'


def test_what_may_not_be_read_is_broken_with_the_reason(public_path: Path) -> None:
    write_chain(public_path, ["closed", "child", "base", "file", "document"])
    write_tag(public_path, "unlisted", "base")
    (public_path / "closed").chmod(0o700)
    (public_path / "unlisted").chmod(0o711)
    (public_path / "file" / "memory.bin").chmod(0o600)
    (public_path / "document" / "snapshot.json").chmod(0o600)
    write_document(public_path, "base", f"{{{MEMORY}}}")
    done = diffmergefs_as_nobody("list", "--json", public_path)
    assert (done.returncode, done.stderr) == (0, "")
    reasons = {row["tag"]: row["reason"] for row in json.loads(done.stdout)}
    assert reasons == {
        "base": None,
        "closed": "closed: Permission denied",
        "child": "ancestor 'closed' is broken: closed: Permission denied",
        "unlisted": "unlisted: Permission denied",
        "file": "file/memory.bin: Permission denied",
        "document": "document/snapshot.json: Permission denied",
    }


@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK], ids=["char", "block"])
@pytest.mark.parametrize("name", ["snapshot.json", "memory.bin"])
def test_a_device_breaks_its_tag_and_is_not_opened(store: Path, kind: int, name: str) -> None:
    path = store / "base" / name
    path.rename(store / "real")
    os.mknod(path, 0o600 | kind, os.makedev(240, 77))  # no driver: an open fails
    assert "regular file" in problem(store)
    assert "regular file" in mistake(3, "info", store / "base")
