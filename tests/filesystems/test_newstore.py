"""Who owns the files of a new store."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tests.support.images import PAGE, write_layer
from tests.support.subjects.newstore import convert, store
from tests.support.users import NOBODY

__all__ = ["store"]


def test_all_files_keep_their_owners(store: Path, public_path: Path) -> None:
    for tag, mode in (("base", 0o640), ("work", 0o600), ("leaf", 0o754)):
        os.chown(store / tag / "memory.bin", NOBODY, NOBODY)
        (store / tag / "memory.bin").chmod(mode)
    os.chown(write_layer(store / "leaf" / "rootfs.img", PAGE, []), NOBODY, NOBODY)
    os.chown(store / "leaf", NOBODY, NOBODY)
    new = public_path / "new"
    convert(store, new, seal=True)
    for tag, mode in (("base", 0o640), ("work", 0o600), ("leaf", 0o754)):
        memory, beside = (os.stat(new / tag / f"memory.bin{end}") for end in ("", ".bmap"))
        assert (memory.st_uid, memory.st_gid) == (beside.st_uid, beside.st_gid) == (NOBODY, NOBODY)
        assert stat.S_IMODE(memory.st_mode) == mode
        assert stat.S_IMODE(beside.st_mode) == mode & 0o666
    for name in ("", "rootfs.img", "vmstate", "snapshot.json"):
        old, made = (os.stat(root / "leaf" / name) for root in (store, new))
        assert (made.st_mode, made.st_uid, made.st_gid) == (old.st_mode, old.st_uid, old.st_gid)
