"""Formats that only look like layers: declined by name, wherever one is given."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffmergefs import apply_diff, open_chain, open_image, seal_layer
from diffmergefs.core import foreign
from diffmergefs.core.errors import BrokenChainError, ForeignFormatError
from diffmergefs.core.layer import Layer
from diffmergefs.stores.catalog import read_catalog
from tests.support.commands import mistake
from tests.support.images import PAGE, signed, write_layer
from tests.support.stores import SIZE, write_numbered
from tests.support.subjects.foreign import QCOW2, foreign_file

__all__ = ["foreign_file"]


UUID = "12345678-9abc-def0-1234-56789abcdef0"
DIRECTORIES = {
    "e2b": (["memfile", "memfile.header", "snapfile", "metadata.json"], "is an e2b build"),
    "wrenn": ([f"memfile.{UUID}", "memfile.header", "snapfile"], "is a wrenn snapshot"),
    "wrenn-cow": (["memfile", "memfile.header", "rootfs.cow"], "is a wrenn snapshot"),
    "agentenv": (["snapshot.json", "firecracker-manifest.json", "vm_state.bin"], "of AgentENV"),
    "agentenv-local": (["mem_image.json", "vm_state.bin"], "is of AgentENV"),
}


@pytest.fixture(params=DIRECTORIES)
def foreign_folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    names, what = DIRECTORIES[request.param]
    folder = tmp_path / "store" / "build"
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(b"{}")
    return folder, what


def test_a_file_is_declined_wherever_a_layer_is_given(
    foreign_file: tuple[Path, str, str], tmp_path: Path
) -> None:
    path, name, instead = foreign_file
    good = write_layer(tmp_path / "good", SIZE, [(0, signed(0, 0, SIZE))])
    calls: list[Callable[[], object]] = [
        lambda: open_chain(path),
        lambda: open_chain(good, [path]),
        lambda: apply_diff(path, good),
        lambda: apply_diff(good, path),
        lambda: seal_layer(path),
        lambda: open_image(path),
        lambda: read_catalog(str(path)),
        lambda: Layer.open(str(path)),
    ]
    before = path.read_bytes()
    for call in calls:
        with pytest.raises(ForeignFormatError) as caught:
            call()
        text = str(caught.value)
        assert text.startswith(f"{path}: ") and name in text and instead in text
        assert len(text.splitlines()) == 1
    assert path.read_bytes() == before and not Path(f"{path}.bmap").exists()


def test_a_directory_is_declined_as_source_and_as_image(foreign_folder: tuple[Path, str]) -> None:
    folder, what = foreign_folder
    for call in (lambda: read_catalog(str(folder)), lambda: open_image(folder)):
        with pytest.raises(ForeignFormatError) as caught:
            call()
        text = str(caught.value)
        assert text.startswith(f"{folder}: ") and what in text and "holes mean nothing" in text
    assert what in mistake(22, "list", folder)
    assert what in mistake(22, "info", folder)


def test_a_dump_of_criu_is_declined_as_source_and_as_image(tmp_path: Path) -> None:
    for name in ("inventory.img", "pagemap-1.img", "pages-1.img"):
        (tmp_path / name).touch()
    for verb in ("list", "info", "verify", "seal"):
        line = mistake(22, verb, tmp_path)
        assert line.endswith(
            "is a CRIU dump: pages of processes, packed in pages-*.img, and no memory"
            " of a VM; restore it with `criu restore`\n"
        )
    (tmp_path / "inventory.img").unlink()
    assert foreign.of_directory(os.listdir(tmp_path)) is None


@pytest.mark.parametrize("name", ["memfile", f"memfile.{UUID}"])
def test_the_memory_in_a_packed_directory_is_declined_as_a_layer(name: str, tmp_path: Path) -> None:
    path = write_layer(tmp_path / name, SIZE, [(0, signed(0, 0, SIZE))])
    with open_chain(path).view as view:  # by itself a name says nothing
        assert view.size == SIZE
    (tmp_path / "memfile.header").touch()
    good = write_layer(tmp_path / "good", SIZE, [(0, signed(0, 0, SIZE))])
    link = tmp_path / "link"
    link.symlink_to(path)
    what = "is an e2b build" if name == "memfile" else "is a wrenn snapshot"
    calls: list[Callable[[], object]] = [
        lambda: open_chain(path),
        lambda: open_chain(link),
        lambda: open_chain(good, [path]),
        lambda: open_image(path),
        lambda: apply_diff(good, path),
        lambda: seal_layer(path),
    ]
    for call in calls:
        with pytest.raises(ForeignFormatError, match=what):
            call()


@pytest.mark.parametrize("layout", [None, "forkd", "superserve", "cloud-hypervisor"])
def test_one_among_snapshots_is_listed_with_its_reason(
    foreign_folder: tuple[Path, str], layout: str | None
) -> None:
    folder, what = foreign_folder
    catalog = read_catalog(str(folder.parent), layout)
    with pytest.raises(BrokenChainError, match=what):
        catalog.chain("build")


def test_a_numbered_layer_is_declined_when_it_is_opened(tmp_path: Path) -> None:
    write_numbered(tmp_path, ["000-base.mem", "001-work.mem"])
    with (tmp_path / "000-base.mem").open("r+b") as file:
        file.write(QCOW2)
    with pytest.raises(ForeignFormatError, match=r"000-base\.mem: is a qcow2 image"):
        open_image(tmp_path / "001-work.mem")


@pytest.mark.parametrize("head", [b"", b"Q", b"QFI", b"QEMU", b"QEVM\1", b"\0QFI\xfb", b"LSMT"])
def test_what_only_resembles_a_mark_is_taken(head: bytes, tmp_path: Path) -> None:
    assert foreign.of_head(head) is None
    path = write_layer(tmp_path / "image", SIZE, [(0, head or b"\0")])
    with open_chain(path).view as view:
        assert view.read(0, len(head)) == head


def test_a_mark_in_a_hole_or_elsewhere_in_a_layer_is_none(tmp_path: Path) -> None:
    path = write_layer(tmp_path / "image", SIZE, [(PAGE, QCOW2)])
    with open_chain(path).view as view:
        assert view.read(PAGE, len(QCOW2)) == QCOW2


def test_a_beginning_that_cannot_be_read_is_no_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_layer(tmp_path / "image", SIZE, [(0, QCOW2)])

    def fail(*arguments: Any) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    assert Layer.open(str(path)).size == SIZE


def test_directories_without_marks_pass() -> None:
    for names in (
        [],
        ["memfile"],
        ["snapshot.json", "memory.bin"],
        ["memory-ranges", "state.json"],
    ):
        assert foreign.of_directory(names) is None


@pytest.mark.programs
def test_what_qemu_itself_writes_is_known(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "64M"], check=True, timeout=60)
    with pytest.raises(ForeignFormatError, match="is a qcow2 image"):
        open_chain(path)
