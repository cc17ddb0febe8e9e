"""What is said of a directory without snapshots, and of what lies beside snapshots."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs.core import beneath
from diffmergefs.core.errors import BrokenChainError
from diffmergefs.stores.catalog import LAYOUTS, read_catalog
from diffmergefs.stores.remarks import listed, no_snapshot, remarks, require_store
from tests.support.images import write_layer
from tests.support.stores import SIZE, write_chain, write_numbered, write_tag


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        write_layer(folder / name, SIZE, [(0, b"x")])


def firecracker(folder: Path) -> None:
    touch(folder, "mem_file", "mem_diff", "snapshot_file")


def firecracker_short(folder: Path) -> None:
    touch(folder, "vm.mem", "vm.state")


def firecracker_each(folder: Path) -> None:
    for name in ("one", "two"):
        touch(folder / name, "mem", "vmstate")


def fcvm(folder: Path) -> None:
    touch(folder / "web", "memory.bin", "vmstate.bin", "disk.raw", "config.json")


def criu(folder: Path) -> None:
    touch(folder / "dump", "inventory.img", "pagemap-1.img", "pages-1.img", "core-1.img")


def qemu(folder: Path) -> None:
    touch(folder)
    (folder / "vm.qcow2").write_bytes(b"QFI\xfb" + bytes(4092))
    (folder / "vm.migration").write_bytes(b"QEVM" + bytes(4092))


def numbered(folder: Path) -> None:
    touch(folder, "000-base.ram", "001-work.ram")


def memory(folder: Path) -> None:
    touch(folder, "guest.ram")


def above(folder: Path) -> None:
    write_chain(folder / "snapshots", ["base", "work"])


def symlinks(folder: Path) -> None:
    write_chain(folder.parent / "elsewhere", ["base"])
    folder.mkdir()
    (folder / "base").symlink_to(folder.parent / "elsewhere" / "base")


def empty(folder: Path) -> None:
    folder.mkdir()


def documents(folder: Path) -> None:
    touch(folder, "README", "memory-notes.txt")


#: What stands there, what is said of it, and the remedy.
SEEN: dict[Callable[[Path], None], tuple[str, str]] = {
    firecracker: ("files of Firecracker (mem_diff, mem_file, snapshot_file)", "--base FULL --diff"),
    firecracker_short: ("files of Firecracker (vm.mem, vm.state)", "--base FULL"),
    firecracker_each: ("directories with snapshot files of Firecracker (one, two)", "--base FULL"),
    fcvm: ("directories with a snapshot of fcvm (web)", "--base {}/web/memory.bin"),
    criu: ("directories with a CRIU dump (dump)", "`criu restore`"),
    qemu: ("vm.migration is a QEMU migration stream, vm.qcow2 is a qcow2 image", "with QEMU"),
    numbered: ("numbered files with other suffixes (000-base.ram, 001-work.ram)", "--suffix .ram"),
    memory: ("memory files (guest.ram)", "--base FULL"),
    above: ("they are one level down, in {}/snapshots", "give that directory"),
    symlinks: ("symlinks (base)", "give the directory that they lead into, as {}/../elsewhere"),
    empty: ("it is empty", "give the directory"),
    documents: ("it holds 2 other names (README, memory-notes.txt)", "give the directory"),
}


@pytest.mark.parametrize("make", SEEN, ids=lambda make: make.__name__)
def test_a_directory_without_snapshots_is_described(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = tmp_path / "here"
    make(folder)
    what, remedy = (os.path.normpath(text.format(folder)) for text in SEEN[make])
    (line,) = remarks(read_catalog(str(folder)))
    assert line.startswith(f"{folder}: no snapshots: ")
    found, step, looked_for = line.split("; ")[0], *line.split("; ")[-2:]
    assert what in found and remedy in step
    assert looked_for.startswith("looked for ") and all(name in looked_for for name in LAYOUTS)
    error = no_snapshot(str(folder))
    assert f"{folder}: is neither a snapshot nor a directory of snapshots: " in str(error)
    assert what in str(error) and remedy in error.remedy
    require_store(read_catalog(str(folder)))  # it may become a store yet


def test_another_layout_than_the_one_that_was_asked_for_is_named(tmp_path: Path) -> None:
    write_chain(tmp_path, ["base"])
    (line,) = remarks(read_catalog(str(tmp_path), "superserve"), "superserve")
    assert "it has snapshots of the layout forkd; leave out --layout" in line
    assert line.endswith(
        "looked for superserve (mem.snap or mem.diff up to three directories down)"
    )


@pytest.mark.parametrize("documented", [True, False])
def test_a_snapshot_is_no_directory_of_snapshots(documented: bool, tmp_path: Path) -> None:
    folder = write_tag(tmp_path / "store", "base")
    if not documented:
        (folder / "snapshot.json").unlink()
    with pytest.raises(BrokenChainError) as caught:
        require_store(read_catalog(str(folder)))
    assert str(caught.value) == (
        f"{folder}: is one snapshot (layout forkd), not a directory of them; mount or list its"
        f" parent directory, {tmp_path}/store"
    )


def test_a_directory_of_snapshots_is_no_snapshot_and_names_them(tmp_path: Path) -> None:
    write_chain(tmp_path, [f"t{n}" for n in range(10)])
    error = no_snapshot(str(tmp_path))
    assert f"{tmp_path}: is a directory of 10 snapshots, not one of them; name one: " in str(error)
    assert error.remedy.endswith(f"{tmp_path}/t7 and 2 more")


def test_what_is_passed_over_beside_snapshots_has_a_line_each(tmp_path: Path) -> None:
    store = write_chain(tmp_path / "store", ["base", "work"])
    assert remarks(read_catalog(str(store))) == []
    (store / "latest").symlink_to("work")
    firecracker(store / "raw")
    touch(store / "scratch", "notes")
    (store / "new.tmp").mkdir()
    for name in ("lost+found", ".git", ".compact-staging-1"):
        (store / name).mkdir()
    touch(store, "README")
    lines = [line.removeprefix(f"{store}/") for line in remarks(read_catalog(str(store)))]
    assert [line.partition(";")[0] for line in lines] == [
        f"latest: passed over: a symlink to {store}/work",
        "new.tmp: passed over: a temporary name",
        "raw: passed over: snapshot files of Firecracker (mem_diff, mem_file, snapshot_file)",
        "scratch: passed over: no snapshot of the layout forkd",
    ]


def test_numbered_memory_that_is_no_layer_has_a_line(tmp_path: Path) -> None:
    names = ["000-base.mem", "001-work.mem"]
    folder = write_numbered(tmp_path, names, companions=["001-work.vmstate"])
    assert remarks(read_catalog(str(folder))) == []
    touch(folder, "001-work.img", "002-next.img")
    (folder / "logs").mkdir()
    lines = [line.removeprefix(f"{folder}/") for line in remarks(read_catalog(str(folder)))]
    assert [line.partition(":")[0] for line in lines] == ["001-work.img", "002-next.img", "logs"]
    assert all("--suffix" in line for line in lines[:2])


def test_many_lines_are_counted_and_no_more_directories_are_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_chain(tmp_path, ["base"])
    for n in range(30):
        (tmp_path / f"other{n:02}").mkdir()
    catalog = read_catalog(str(tmp_path))
    opened: list[str] = []
    open_directory = beneath.open_directory

    def counted(root: beneath.Root, path: str) -> int:
        opened.append(path)
        return open_directory(root, path)

    monkeypatch.setattr(beneath, "open_directory", counted)
    lines = remarks(catalog)
    assert {path for path in opened if path.startswith("other")} == {
        f"other{n:02}" for n in range(20)
    }
    assert len(lines) == 21
    assert lines[-1] == f"{tmp_path}: 10 other names in it passed over"


def test_long_lists_of_names_are_cut_and_hard_names_escaped() -> None:
    assert listed(["a\n", "b"]) == "a\\n, b"
    assert listed([str(n) for n in range(9)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 1 more"
