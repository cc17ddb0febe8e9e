"""Mistakes with `uffd`: one line each, and its exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import mistake
from tests.support.images import PAGE, signed, write_layer


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_layer(tmp_path / "base", 4 * PAGE, [(0, signed(0, 0, 4 * PAGE))])


@pytest.mark.parametrize("around", ["2K", "12K", "4M", "0"])
def test_a_fault_around_must_be_a_power_of_two_pages(base: Path, around: str) -> None:
    line = mistake(2, "uffd", "--base", base, "--socket", "x", "--fault-around", around)
    assert "is not a power of two from 4K to 2M" in line


def test_a_socket_and_an_image_are_needed(base: Path, tmp_path: Path) -> None:
    assert "--socket" in mistake(2, "uffd", "--base", base)
    assert "IMAGE" in mistake(2, "uffd", "--socket", tmp_path / "x")
    owner = mistake(2, "uffd", "--base", base, "--socket", "x", "--socket-owner", "no-such:user")
    assert "no-such" in owner


def test_what_is_missing_is_named(base: Path, tmp_path: Path) -> None:
    line = mistake(14, "uffd", "--base", base, "--socket", tmp_path / "none" / "x")
    assert line.startswith(f"diffmergefs: {tmp_path}/none/x: No such file or directory")
    line = mistake(14, "uffd", "--base", tmp_path / "missing", "--socket", tmp_path / "x")
    assert str(tmp_path / "missing") in line and not (tmp_path / "x").exists()


def test_a_record_needs_its_directory(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    sets: list[str | Path] = ["--record", "--working-set-dir", tmp_path / "file"]
    assert str(tmp_path / "file") in mistake(
        14, "uffd", "--base", base, "--socket", tmp_path / "x", *sets
    )


def test_status_gives_metrics_of_one_thing() -> None:
    assert "--metrics goes with" in mistake(2, "status", "--metrics")
