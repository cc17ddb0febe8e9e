"""The extended attributes of memory files, and who may read them."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest

from diffmergefs.fuse import nodes
from diffmergefs.fuse.served import Store
from diffmergefs.opening.trust import TrustPolicy
from tests.support.commands import succeed
from tests.support.images import PAGE
from tests.support.mounts import mounted
from tests.support.stores import BASE_PAGES, write_chain, write_numbered, write_tag
from tests.support.users import NOBODY, run_as

CHAIN, LAYERS, DIRTY = (f"user.diffmergefs.{name}" for name in ("chain", "layers", "dirty_bytes"))
BASE_BYTES = len(BASE_PAGES) * PAGE


@pytest.fixture
def store(public_path: Path) -> Path:
    return write_chain(public_path / "store", ["base", "work", "leaf"])


def errno_of_getting(path: Path, name: str) -> int | None:
    try:
        os.getxattr(path, name)
    except OSError as error:
        return error.errno
    return None


def test_the_attributes_of_a_memory_file_describe_its_chain(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint, "--allow-other"):
        memory = mountpoint / "leaf" / "memory.bin"
        assert os.listxattr(memory) == [CHAIN, LAYERS, DIRTY]
        assert json.loads(os.getxattr(memory, CHAIN)) == [
            {"path": str(store / "base/memory.bin"), "data_bytes": BASE_BYTES},
            {"path": str(store / "work/memory.bin"), "data_bytes": PAGE},
            {"path": str(store / "leaf/memory.bin"), "data_bytes": PAGE},
        ]
        assert os.getxattr(memory, LAYERS) == b"3"
        assert os.getxattr(memory, DIRTY) == b"%d" % PAGE
        assert os.getxattr(mountpoint / "base" / "memory.bin", DIRTY) == b"%d" % BASE_BYTES
        # The same numbers as those of `info` and `list`.
        info = json.loads(succeed("info", "--json", store / "leaf"))
        known = [{"path": x["path"], "data_bytes": x["data_bytes"]} for x in info["layers"]]
        assert json.loads(os.getxattr(memory, CHAIN)) == known
        rows = {row["tag"]: row for row in json.loads(succeed("list", "--json", store))}
        assert rows["leaf"]["dirty_bytes"] == PAGE


def test_no_other_file_has_the_attributes(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint):
        leaf = mountpoint / "leaf"
        for path in (mountpoint, leaf, leaf / "vmstate", leaf / "snapshot.json"):
            assert os.listxattr(path) == []
            assert errno_of_getting(path, CHAIN) == errno.ENODATA
        for name in ("user.other", "user.diffmergefs.", "user.diffmergefs.chain2", "trusted.x"):
            assert errno_of_getting(leaf / "memory.bin", name) == errno.ENODATA


def test_getfattr_shows_them(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint):
        command: list[str | Path] = [
            "getfattr",
            "--absolute-names",
            "-d",
            mountpoint / "leaf" / "memory.bin",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert f'{DIRTY}="{PAGE}"\n{LAYERS}="3"\n' in done.stdout.replace(f'{CHAIN}="', "", 1)


def test_a_user_who_may_not_read_the_file_does_not_learn_its_layers(
    store: Path, mountpoint: Path
) -> None:
    """One private layer hides the whole view from other users (law 9)."""
    (store / "work" / "memory.bin").chmod(0o600)
    with mounted(store, mountpoint, "--allow-other"):
        for tag, allowed in (("base", True), ("work", False), ("leaf", False)):
            memory = str(mountpoint / tag / "memory.bin")
            for name in (CHAIN, LAYERS, DIRTY):
                argv = [
                    "/usr/bin/getfattr",
                    "--absolute-names",
                    "--only-values",
                    "-n",
                    name,
                    memory,
                ]
                done = run_as(NOBODY, NOBODY, argv)
                assert (done.returncode == 0) == allowed, done
                assert bool(done.stdout) == allowed
            reading = run_as(NOBODY, NOBODY, ["/bin/cat", memory])
            assert (reading.returncode == 0) == allowed


def test_hard_names_are_ascii_json(public_path: Path, mountpoint: Path) -> None:
    names = ["000-\udcff.mem", '001-a"\n\x1b.mem', "002-é.mem"]
    store = write_numbered(public_path / "store", names)
    with mounted(store, mountpoint):
        text = os.getxattr(mountpoint / "é" / "002-é.mem", CHAIN)
    assert text.isascii() and b"\n" not in text
    assert [layer["path"] for layer in json.loads(text)] == [f"{store}/{name}" for name in names]


def test_a_chain_too_long_for_an_attribute_fails_with_e2big(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(write_chain(tmp_path / "store", ["base", "leaf"])), TrustPolicy())
    store.look()
    image = store.open("leaf")
    full = image.xattr(store.root, CHAIN.encode())
    monkeypatch.setattr(nodes, "LONGEST_XATTR", len(full))
    assert image.xattr(store.root, CHAIN.encode()) == full
    monkeypatch.setattr(nodes, "LONGEST_XATTR", len(full) - 1)
    with pytest.raises(OSError) as caught:
        image.xattr(store.root, CHAIN.encode())
    assert caught.value.errno == errno.E2BIG
    assert image.xattr(store.root, LAYERS.encode()) == b"2"


def test_a_long_chain_is_complete_and_one_beyond_the_kernels_limit_is_refused(
    public_path: Path, mountpoint: Path
) -> None:
    store = public_path / "store"
    parent = None
    for number in range(330):
        tag = f"{number:03}-{'x' * 60}"
        memory = f"{'m' * 100}.bin"
        write_tag(store, tag, parent, layer=number, memory=memory)
        parent = tag
    with mounted(store, mountpoint):
        deep = sorted(mountpoint.iterdir())[200]
        layers = json.loads(os.getxattr(deep / memory, CHAIN))
        assert len(layers) == 201 and layers[-1]["path"] == str(store / deep.name / memory)
        deepest = mountpoint / str(parent) / memory
        assert errno_of_getting(deepest, CHAIN) == errno.E2BIG
        assert os.getxattr(deepest, LAYERS) == b"330"
