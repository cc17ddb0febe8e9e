"""Mistakes with `uffd`: one line each, and its exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import mistake
from tests.support.images import PAGE, signed, write_layer
from tests.support.stores import write_chain


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_layer(tmp_path / "base", 4 * PAGE, [(0, signed(0, 0, 4 * PAGE))])


@pytest.mark.parametrize("around", ["2K", "12K", "4M", "0"])
def test_a_fault_around_must_be_a_power_of_two_pages(base: Path, around: str) -> None:
    line = mistake(2, "uffd", "--base", base, "--socket", "x", "--fault-around", around)
    assert "is not a power of two from 4K to 2M" in line


def test_a_socket_and_an_image_are_needed(base: Path, tmp_path: Path) -> None:
    line = mistake(2, "uffd", "--base", base)
    assert "give either --socket PATH or --socket-dir DIR" in line
    assert "IMAGE" in mistake(2, "uffd", "--socket", tmp_path / "x")
    owner = mistake(2, "uffd", "--base", base, "--socket", "x", "--socket-owner", "no-such:user")
    assert "no-such" in owner


def test_what_is_missing_is_named(base: Path, tmp_path: Path) -> None:
    line = mistake(14, "uffd", "--base", base, "--socket", tmp_path / "none" / "x")
    assert line.startswith(f"diffmergefs: {tmp_path}/none/x: No such file or directory")
    line = mistake(14, "uffd", "--base", tmp_path / "missing", "--socket", tmp_path / "x")
    assert str(tmp_path / "missing") in line and not (tmp_path / "x").exists()


def test_a_directory_of_sockets_goes_with_a_directory_of_snapshots(
    base: Path, tmp_path: Path
) -> None:
    store = write_chain(tmp_path / "store", ["base", "leaf"])
    place: list[str | Path] = ["--socket-dir", tmp_path / "sockets"]
    (tmp_path / "sockets").mkdir()
    both = mistake(2, "uffd", store, *place, "--socket", tmp_path / "x")
    assert "give either --socket PATH or --socket-dir DIR" in both
    assert "goes with SOURCE" in mistake(2, "uffd", "--base", base, *place)
    one: list[str | Path] = [store / "leaf", "--socket", tmp_path / "x"]
    assert "--layout goes with --socket-dir" in mistake(2, "uffd", *one, "--layout", "forkd")
    assert "its parent directory" in mistake(3, "uffd", store / "leaf", *place)
    assert "a file, not a directory of snapshots" in mistake(14, "uffd", base, *place)
    missing = mistake(14, "uffd", store, "--socket-dir", tmp_path / "none" / "x")
    assert missing.startswith(f"diffmergefs: {tmp_path}/none/x: No such file or directory")
    assert "Not a directory" in mistake(14, "uffd", store, "--socket-dir", base)
    inside = mistake(8, "uffd", store, "--socket-dir", store / "leaf")
    assert f"{store}/leaf: lies in {store}" in inside
    assert list((tmp_path / "sockets").iterdir()) == []


def test_a_record_needs_its_directory(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    sets: list[str | Path] = ["--record", "--working-set-dir", tmp_path / "file"]
    assert str(tmp_path / "file") in mistake(
        14, "uffd", "--base", base, "--socket", tmp_path / "x", *sets
    )


def test_status_gives_metrics_of_one_thing() -> None:
    assert "--metrics goes with" in mistake(2, "status", "--metrics")
