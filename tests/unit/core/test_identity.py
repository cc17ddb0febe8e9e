"""Copies and outputs have no ACL: its mask, which stands as the group's bits, is nobody's right."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from diffmergefs.core.identity import copied_bits, file_bits
from diffmergefs.writing.storediff import StoreRediff
from tests.support.commands import succeed
from tests.support.images import write_layer
from tests.support.stores import BASE_PAGES, SIZE, pages, write_chain
from tests.support.users import STRANGER

pytestmark = pytest.mark.programs


def with_acl(path: Path, mode: int) -> Path:
    path.chmod(mode)
    subprocess.run(["setfacl", "-m", f"u:{STRANGER}:rwx", path], check=True, timeout=60)
    assert stat.S_IMODE(path.stat().st_mode) & 0o070 == 0o070
    return path


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(("mode", "mirrored", "copied"), [(0o600, 0o400, 0o600), (0, 0, 0)])
def test_of_a_file_with_an_acl_its_owner_alone_keeps_bits(
    public_path: Path, mode: int, mirrored: int, copied: int
) -> None:
    path = str(with_acl(write_layer(public_path / "file", SIZE, []), mode))
    known = os.stat(path).st_mode
    assert (file_bits(path, known), copied_bits(path, known)) == (mirrored, copied)
    subprocess.run(["setfacl", "-b", path], check=True, timeout=60)
    os.chmod(path, 0o2751)
    known = os.stat(path).st_mode
    assert (file_bits(path, known), copied_bits(path, known)) == (0o751, 0o2751)


def test_outputs_and_seals_do_not_let_in_the_group_that_an_acl_shuts_out(
    public_path: Path,
) -> None:
    base = with_acl(write_layer(public_path / "base", SIZE, pages(0, BASE_PAGES)), 0o600)
    diff = with_acl(write_layer(public_path / "diff", SIZE, pages(1, [1])), 0o600)
    layers = ("--base", base, "--diff", diff)
    succeed("flatten", *layers, "-o", public_path / "whole")
    succeed("rediff", base, public_path / "whole", "-o", public_path / "new diff")
    succeed("seal", diff)
    assert mode_of(public_path / "whole") == 0o600
    assert mode_of(public_path / "new diff") == 0o600
    assert mode_of(public_path / "diff.bmap") == 0o600


def test_a_new_store_does_not_either(public_path: Path) -> None:
    store = write_chain(public_path / "store", ["base", "work"])
    (store / "work" / "sub").mkdir()
    (store / "work" / "sub" / "empty").touch()
    places = ["base", "work/sub"]
    files = ["base/memory.bin", "base/vmstate", "base/snapshot.json", "work/sub/empty"]
    for name in places:
        with_acl(store / name, 0o700)
    for name in files:
        with_acl(store / name, 0o600)
    with StoreRediff(store) as opened:
        opened.write(public_path / "new")
    assert {name: mode_of(public_path / "new" / name) for name in places} == dict.fromkeys(
        places, 0o700
    )
    assert {name: mode_of(public_path / "new" / name) for name in files} == dict.fromkeys(
        files, 0o600
    )
