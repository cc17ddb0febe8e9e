"""The numbers of an image, and the entries of its map."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmergefs.analysis.info import (
    ChainInfo,
    LayerInfo,
    MapEntry,
    describe,
    entries,
    scanned_entries,
)
from diffmergefs.core import sparse
from diffmergefs.core.errors import LayerChangedError
from diffmergefs.core.view import MergedView
from diffmergefs.opening.images import open_chain
from diffmergefs.opening.trust import TrustPolicy
from tests.support.images import PAGE, signed, write_layer
from tests.support.inputs import unchanged

SIZE = 32 * PAGE


def layer(directory: Path, number: int, *pages: int, size: int = SIZE) -> Path:
    """A layer with data in these pages."""
    extents = [(page * PAGE, signed(number, page * PAGE, PAGE)) for page in pages]
    return write_layer(directory / f"{number:03}.mem", size, extents)


def test_a_chain(tmp_path: Path) -> None:
    base = layer(tmp_path, 0, 0, 1, 2, 3)
    first = layer(tmp_path, 1, 1, 5, 6)
    second = layer(tmp_path, 2, 2, 6)
    grain = os.stat(base).st_blksize
    with unchanged([base, first, second]), open_chain(base, [first, second]).view as view:
        facts = describe(open_chain(base, [first, second]))
        assert view.size == facts.size
    assert facts == ChainInfo(
        size=SIZE,
        layers=(
            LayerInfo(str(base), 4 * PAGE, 1, 2 * PAGE, 2 * PAGE, grain, "base"),
            LayerInfo(str(first), 3 * PAGE, 2, 2 * PAGE, PAGE, grain, "trusted"),
            LayerInfo(str(second), 2 * PAGE, 2, 2 * PAGE, 0, grain, "trusted"),
        ),
        holes=26 * PAGE,
        segments=6,
        dense=False,
    )


def test_the_dictionary_is_json(tmp_path: Path) -> None:
    base, diff = layer(tmp_path, 0, 0, 1), layer(tmp_path, 1, 1)
    facts = describe(open_chain(base, [diff])).as_dict()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["size"] == SIZE
    assert [entry["path"] for entry in facts["layers"]] == [str(base), str(diff)]
    assert set(facts["layers"][1]) == {
        "path",
        "data_bytes",
        "extents",
        "visible_bytes",
        "shadowed_bytes",
        "grain",
        "trust",
    }


def test_a_dense_diff(tmp_path: Path) -> None:
    base, diff = layer(tmp_path, 0, 0), layer(tmp_path, 1, *range(32))
    facts = describe(open_chain(base, [diff], TrustPolicy(dense=True)))
    assert facts.dense
    assert (facts.holes, facts.segments) == (0, 1)
    assert facts.layers[0].shadowed_bytes == PAGE


def test_overridden_checks_stand_with_their_layer(tmp_path: Path) -> None:
    base, good = layer(tmp_path, 0, 0), layer(tmp_path, 1, 2, 3)
    bad, worse = layer(tmp_path, 2, 5), layer(tmp_path, 3, 5)
    policy = TrustPolicy(page_size=2 * PAGE, trust_grain={"all"})
    facts = describe(open_chain(base, [good, bad, worse], policy))
    assert [entry.trust for entry in facts.layers] == [
        "base",
        "trusted",
        "overridden: alignment",
        "overridden: alignment",
    ]


@pytest.mark.parametrize("pages", [[], [0, 31]])
def test_a_base_alone(tmp_path: Path, pages: list[int]) -> None:
    facts = describe(open_chain(layer(tmp_path, 0, *pages)))
    assert facts.segments == facts.layers[0].extents == len(pages)
    assert facts.holes == SIZE - len(pages) * PAGE


@settings(deadline=None, max_examples=30)
@given(chain=st.lists(st.sets(st.integers(0, 30)), min_size=1, max_size=5))
def test_bytes_add_up(tmp_path_factory: pytest.TempPathFactory, chain: list[set[int]]) -> None:
    directory = tmp_path_factory.mktemp("info")
    paths = [layer(directory, n, *sorted(pages)) for n, pages in enumerate(chain)]
    facts = describe(open_chain(paths[0], paths[1:]))
    shown = sum(entry.visible_bytes for entry in facts.layers)
    assert shown + facts.holes == SIZE
    assert shown == len(set().union(*chain)) * PAGE
    for entry, pages in zip(facts.layers, chain, strict=True):
        assert entry.data_bytes == len(pages) * PAGE
        assert entry.data_bytes == entry.visible_bytes + entry.shadowed_bytes


MIB = 1 << 20
SCANNED = 4 * MIB


def chain(directory: Path) -> list[Path]:
    """Data in [0, 2 MiB + 100), a diff over pages 3 to 5; zeros in pages 1, 4 and the 2nd MiB."""
    base = bytearray(signed(0, 0, 2 * MIB + 100))
    base[PAGE : 2 * PAGE] = bytes(PAGE)
    base[MIB : 2 * MIB] = bytes(MIB)
    diff = bytearray(signed(1, 3 * PAGE, 3 * PAGE))
    diff[PAGE : 2 * PAGE] = bytes(PAGE)
    return [
        write_layer(directory / "base", SCANNED, [(0, bytes(base))]),
        write_layer(directory / "diff", SCANNED, [(3 * PAGE, bytes(diff))]),
    ]


def opened(paths: list[Path]) -> MergedView:
    return open_chain(paths[0], paths[1:]).view


def scan(view: MergedView, start: int = 0, stop: int = SCANNED, page: int = PAGE) -> list[MapEntry]:
    return list(scanned_entries(view, start, stop, page, lambda done: None))


def test_without_a_scan_only_holes_are_zero(tmp_path: Path) -> None:
    with opened(chain(tmp_path)) as view:
        end = view.layers[0].extents.stops[-1]
        assert list(entries(view, 0, SCANNED)) == [
            MapEntry(0, 3 * PAGE, 0, False),
            MapEntry(3 * PAGE, 6 * PAGE, 1, False),
            MapEntry(6 * PAGE, end, 0, False),
            MapEntry(end, SCANNED, None, True),
        ]
        assert list(entries(view, 10, 20)) == [MapEntry(10, 20, 0, False)]


def test_a_scan_tells_pages_of_zeros(tmp_path: Path) -> None:
    paths = chain(tmp_path)
    with unchanged(paths), opened(paths) as view:
        end = view.layers[0].extents.stops[-1]
        assert scan(view) == [
            MapEntry(0, PAGE, 0, False),
            MapEntry(PAGE, 2 * PAGE, 0, True),
            MapEntry(2 * PAGE, 3 * PAGE, 0, False),
            MapEntry(3 * PAGE, 4 * PAGE, 1, False),
            MapEntry(4 * PAGE, 5 * PAGE, 1, True),
            MapEntry(5 * PAGE, 6 * PAGE, 1, False),
            MapEntry(6 * PAGE, MIB, 0, False),
            MapEntry(MIB, 2 * MIB, 0, True),
            MapEntry(2 * MIB, end, 0, False),
            MapEntry(end, SCANNED, None, True),
        ]


def test_a_part_of_a_page_is_judged_by_itself(tmp_path: Path) -> None:
    with opened(chain(tmp_path)) as view:
        assert scan(view, PAGE - 1, 2 * PAGE + 1) == [
            MapEntry(PAGE - 1, PAGE, 0, False),
            MapEntry(PAGE, 2 * PAGE, 0, True),
            MapEntry(2 * PAGE, 2 * PAGE + 1, 0, False),
        ]
        # 100 bytes of data and then what the filesystem fills its block with.
        assert scan(view, 2 * MIB + 100, 2 * MIB + 200) == [
            MapEntry(2 * MIB + 100, 2 * MIB + 200, 0, True)
        ]


def test_larger_pages_are_zero_only_as_a_whole(tmp_path: Path) -> None:
    with opened(chain(tmp_path)) as view:
        assert scan(view, 0, 3 * PAGE, 2 * PAGE) == [MapEntry(0, 3 * PAGE, 0, False)]
        assert scan(view, 0, 2 * MIB, 2 * MIB)[-1] == MapEntry(MIB, 2 * MIB, 0, True)


def test_each_byte_of_data_is_read_once_and_no_hole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int, int]] = []
    real = sparse.read_into

    def noted(fd: int, buffer: memoryview, offset: int, flags: int = 0) -> int:
        asked.append((fd, offset, offset + len(buffer)))
        return real(fd, buffer, offset, flags)

    with opened(chain(tmp_path)) as view:
        monkeypatch.setattr(sparse, "read_into", noted)
        base, diff = (layer.fd for layer in view.layers)
        end = view.layers[0].extents.stops[-1]
        done: list[int] = []
        list(scanned_entries(view, 100, SCANNED, PAGE, done.append))
        assert asked == [
            (base, 100, 3 * PAGE),
            (diff, 3 * PAGE, 6 * PAGE),
            (base, 6 * PAGE, MIB),
            (base, MIB, 2 * MIB),
            (base, 2 * MIB, end),
        ]
        assert done == [stop - start for _, start, stop in asked]


def test_a_layer_that_changes_is_no_scan(tmp_path: Path) -> None:
    paths = chain(tmp_path)
    with opened(paths) as view:
        scanning = scanned_entries(view, 0, SCANNED, PAGE, lambda done: None)
        next(scanning)
        paths[0].write_bytes(bytes(SCANNED))
        with pytest.raises(LayerChangedError, match="base"):
            list(scanning)
