"""Seals under a mount: in force at the first lookup, compared once, never ignored."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from diffmergefs import seal_layer
from tests.support.commands import diffmergefs, one_line
from tests.support.images import PAGE, overlay_oracle, write_layer
from tests.support.live import Gate, error_of, note_calls, readers, until
from tests.support.mounts import mounted
from tests.support.stores import BASE_PAGES, SIZE, age, pages, write_numbered, write_tag

REFUSED = "its memory file is not shown"
DIFF = [*pages(1, [1]), (3 * PAGE, bytes(PAGE))]
IMAGE = overlay_oracle(SIZE, [pages(0, BASE_PAGES), DIFF])


@pytest.fixture
def store(public_path: Path) -> Path:
    """base <- work, sealed and then copied by `cat`, <- leaf without a seal."""
    root = public_path / "store"
    write_tag(root, "base")
    memory = write_tag(root, "work", "base", layer=1) / "memory.bin"
    write_layer(memory, SIZE, DIFF)
    seal_layer(memory)
    memory.write_bytes(memory.read_bytes())
    write_tag(root, "leaf", "work", layer=2)
    age(memory, Path(f"{memory}.bmap"))
    return root


@pytest.fixture
def compared(public_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a line for each layer that a daemon has compared with its seal."""
    return note_calls(monkeypatch, public_path, "diffmergefs.sidecars.seal.compare")


def test_a_view_goes_by_the_seals_which_are_not_in_it(
    store: Path, mountpoint: Path, compared: Path
) -> None:
    with mounted(store, mountpoint):
        assert sorted(os.listdir(mountpoint)) == ["base", "leaf", "work"]
        assert compared.read_text() == ""  # at the first lookup, not before
        assert (mountpoint / "work" / "memory.bin").read_bytes() == IMAGE
        leaf = overlay_oracle(SIZE, [pages(0, BASE_PAGES), DIFF, pages(2, [2])])
        assert (mountpoint / "leaf" / "memory.bin").read_bytes() == leaf
        assert compared.read_text() == "work/memory.bin\n"
        assert sorted(os.listdir(mountpoint / "work")) == ["memory.bin", "snapshot.json", "vmstate"]
        with pytest.raises(FileNotFoundError):
            (mountpoint / "work" / "memory.bin.bmap").read_bytes()


def test_a_second_mount_compares_nothing_again(
    store: Path, mountpoint: Path, public_path: Path, compared: Path
) -> None:
    state = f"--state-dir={public_path / 'state'}"
    runs = [((), "work/memory.bin\n"), ((), ""), (("--verify=full",), "work/memory.bin\n")]
    for options, expected in runs:
        compared.write_text("")
        with mounted(store, mountpoint, state, *options):
            assert (mountpoint / "work" / "memory.bin").read_bytes() == IMAGE
        assert compared.read_text() == expected


def test_a_stale_seal_breaks_the_tag_and_its_descendants(store: Path, mountpoint: Path) -> None:
    memory = store / "work" / "memory.bin"
    text = bytearray(memory.read_bytes())
    text[PAGE] ^= 1
    memory.write_bytes(text)
    age(memory)
    with mounted(store, mountpoint, expect_log=(REFUSED, "parent replaced")) as mount:
        for tag in ("work", "leaf"):
            assert error_of(mountpoint / tag / "memory.bin") == errno.EIO
            assert "memory.bin" not in os.listdir(mountpoint / tag)
        assert (mountpoint / "base" / "memory.bin").read_bytes()
        lines = [line for line in mount.log().splitlines() if REFUSED in line]
        assert len(lines) == 2 and all("stale seal" in line for line in lines)
        # Healed by its bytes, without a remount.
        text[PAGE] ^= 1
        memory.write_bytes(text)
        until(lambda: error_of(mountpoint / "work" / "memory.bin") is None, "still broken")
        assert (mountpoint / "work" / "memory.bin").read_bytes() == IMAGE


def test_a_seal_that_comes_or_goes_makes_another_image(store: Path, mountpoint: Path) -> None:
    seal = store / "work" / "memory.bin.bmap"
    path = mountpoint / "work" / "memory.bin"
    text = seal.read_bytes()
    seal.unlink()
    with mounted(store, mountpoint, expect_log=(REFUSED,)):
        assert error_of(path) == errno.EIO  # dense, and its holes look filled
        seal.write_bytes(text)
        until(lambda: error_of(path) is None, "the new seal was not found")
        with path.open("rb") as held:
            assert held.read() == IMAGE
            seal.unlink()
            until(lambda: error_of(path) == errno.EIO, "shown without its seal")
            assert os.pread(held.fileno(), SIZE, 0) == IMAGE


def test_no_seal_and_verify_no(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint, "--no-seal", expect_log=(REFUSED,)):
        assert error_of(mountpoint / "work" / "memory.bin") == errno.EIO
    memory = store / "work" / "memory.bin"
    text = memory.read_bytes()
    memory.write_bytes(text[:PAGE] + b"!" + text[PAGE + 1 :])
    age(memory)
    with mounted(store, mountpoint, "-o", "verify=no", expect_log=("--verify=no",)):
        expected = IMAGE[:PAGE] + b"!" + IMAGE[PAGE + 1 :]
        assert (mountpoint / "work" / "memory.bin").read_bytes() == expected


def test_other_images_are_served_while_a_seal_is_compared(
    store: Path, mountpoint: Path, public_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(public_path / "gate")
    log = note_calls(monkeypatch, public_path, "diffmergefs.sidecars.seal.compare", gate)
    work = mountpoint / "work" / "memory.bin"
    with mounted(store, mountpoint), readers(work, gate) as clients:
        gate.wait_until_reached()
        assert (mountpoint / "base" / "memory.bin").read_bytes()
        assert all(client.poll() is None for client in clients)
        gate.open()
        assert [client.communicate(timeout=60)[0] for client in clients] == [IMAGE] * 8
    assert log.read_text() == "work/memory.bin\n"


def test_numbered_layers_and_explicit_ones(public_path: Path, mountpoint: Path) -> None:
    root = public_path / "layers"
    write_numbered(root, ["000-base.mem", "001-work.mem"])
    work = write_layer(root / "001-work.mem", SIZE, DIFF)
    seal_layer(work)
    work.write_bytes(work.read_bytes())
    age(work, Path(f"{work}.bmap"))
    with mounted(root, mountpoint):
        assert sorted(os.listdir(mountpoint / "work")) == ["001-work.mem"]
        assert (mountpoint / "work" / "001-work.mem").read_bytes() == IMAGE
    chain = ("--base", str(root / "000-base.mem"), "--diff", str(work))
    with mounted(None, mountpoint, *chain):
        assert (mountpoint / "000-base.mem").read_bytes() == IMAGE
    work.write_bytes(b"!" + work.read_bytes()[1:])
    assert "stale seal" in one_line(diffmergefs("mount", "-f", *chain, mountpoint), 17)
    done = diffmergefs("mount", *chain, mountpoint)
    assert done.returncode == 17 and "stale seal" in done.stderr.splitlines()[-1]


def test_list_compares_seals(store: Path) -> None:
    assert "broken" not in diffmergefs("list", store).stdout
    memory = store / "work" / "memory.bin"
    memory.write_bytes(b"!" + memory.read_bytes()[1:])
    said = diffmergefs("list", store).stdout
    assert said.count("broken") == 2 and "stale seal" in said
