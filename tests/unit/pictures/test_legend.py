"""How a map calls what it tells apart."""

from __future__ import annotations

import pytest

from diffmergefs.pictures.legend import (
    BASE,
    HOLE,
    MAX_GROUPS,
    ZEROS,
    Kinds,
    address,
    percent,
    short_names,
    shortened,
    size_text,
)


@pytest.mark.parametrize("layers", [1, 2, 12])
def test_few_layers_are_kinds_of_their_own(layers: int) -> None:
    kinds = Kinds(layers)
    assert len(kinds) == layers + 2 and not kinds.grouped and kinds.note() == ""
    assert [kinds.of(n, False) for n in range(layers)] == list(kinds.layers)
    assert [kinds.label(kind) for kind in kinds.layers] == [str(n) for n in range(layers)]


@pytest.mark.parametrize("layers", [13, 14, 23, 24, 100, 1000])
def test_many_layers_are_groups_of_neighbours(layers: int) -> None:
    kinds = Kinds(layers)
    assert kinds.grouped and len(kinds.layers) == MAX_GROUPS == 12
    assert [n for group in kinds.groups for n in group] == list(range(layers))
    sizes = [len(group) for group in kinds.groups]
    assert sizes[0] == 1  # the base
    assert sizes[1:] == sorted(sizes[1:], reverse=True) and sizes[1] - sizes[-1] <= 1
    for layer in range(layers):
        assert layer in kinds.group(kinds.of(layer, False))
    assert str(layers) in kinds.note() and "12" in kinds.note()


def test_kinds_are_told_by_number_and_name() -> None:
    kinds = Kinds(14)
    names = [f"n{n}" for n in range(14)]
    assert kinds.of(None, True) == HOLE and kinds.of(3, True) == ZEROS
    assert (kinds.label(HOLE), kinds.name(HOLE, names)) == ("-", "zero by hole")
    assert (kinds.label(ZEROS), kinds.name(ZEROS, names)) == ("-", "written zeros")
    assert (kinds.label(BASE), kinds.name(BASE, names)) == ("0", "n0")
    assert (kinds.label(BASE + 1), kinds.name(BASE + 1, names)) == ("1-2", "n1 .. n2")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/s/base/memory.bin", "/s/work/memory.bin"], ["base", "work"]),
        (["/s/0-base.mem", "/s/1-work.mem"], ["0-base", "1-work"]),
        (["mem_file", "mem_diff"], ["mem_file", "mem_diff"]),
        (["vm.mem", "vm.diff"], ["vm.mem", "vm.diff"]),
        (["/s/python/memory.bin"], ["memory.bin"]),
        (["/a/m", "/a/m"], ["m", "m"]),
        (["/m", "/x/m"], ["m", "x/m"]),
        (["a/mem", "b/c/mem"], ["a", "b/c"]),
        (["/a/x/1", "/a/y/2"], ["x/1", "y/2"]),
        (["m", "d/m"], ["m", "d/m"]),
        ([".mem", "a.mem"], [".mem", "a.mem"]),
    ],
)
def test_names_are_what_tells_paths_apart(paths: list[str], names: list[str]) -> None:
    assert short_names(paths) == names


def test_a_long_name_keeps_its_ends() -> None:
    assert shortened("abcdefghij", 10) == "abcdefghij"
    assert shortened("abcdefghijk", 10) == "abcd..hijk"
    assert shortened("abcdefghijk", 5) == "a..jk"


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (0, 10, "0.00 %"),
        (1, 10**9, "<0.01 %"),
        (10**9 - 1, 10**9, ">99.99 %"),
        (10, 10, "100.00 %"),
        (1, 3, "33.33 %"),
    ],
)
def test_a_share_is_never_rounded_to_nothing_or_all(part: int, whole: int, text: str) -> None:
    assert percent(part, whole) == text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (4096, "4 KiB"),
        (100 << 10, "100 KiB"),
        (631 * 4096, "2.46 MiB"),
        (16 << 40, "16 TiB"),
        (5000 << 40, "5000 TiB"),
    ],
)
def test_sizes_are_in_binary_units(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text


def test_addresses_of_one_range_are_equally_wide() -> None:
    assert address(0x1000, 1 << 20) == "0x00001000"
    assert address(0x1000, 1 << 36) == "0x0000001000"
    assert address(1 << 36, 1 << 36) == "0x1000000000"
