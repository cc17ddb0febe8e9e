"""The entries of a view: written zeros are told by one scan of the data, and only of the data."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffmergefs.analysis.zeros import MapEntry, entries, scanned_entries
from diffmergefs.core import sparse
from diffmergefs.core.errors import LayerChangedError
from diffmergefs.core.view import MergedView
from diffmergefs.opening.images import open_chain
from tests.support.images import PAGE, signed, write_layer
from tests.support.inputs import unchanged

MIB = 1 << 20
SIZE = 4 * MIB


def chain(directory: Path) -> list[Path]:
    """Data in [0, 2 MiB + 100), a diff over pages 3 to 5; zeros in pages 1, 4 and the 2nd MiB."""
    base = bytearray(signed(0, 0, 2 * MIB + 100))
    base[PAGE : 2 * PAGE] = bytes(PAGE)
    base[MIB : 2 * MIB] = bytes(MIB)
    diff = bytearray(signed(1, 3 * PAGE, 3 * PAGE))
    diff[PAGE : 2 * PAGE] = bytes(PAGE)
    return [
        write_layer(directory / "base", SIZE, [(0, bytes(base))]),
        write_layer(directory / "diff", SIZE, [(3 * PAGE, bytes(diff))]),
    ]


def opened(paths: list[Path]) -> MergedView:
    return open_chain(paths[0], paths[1:]).view


def scan(view: MergedView, start: int = 0, stop: int = SIZE, page: int = PAGE) -> list[MapEntry]:
    return list(scanned_entries(view, start, stop, page, lambda done: None))


def test_without_a_scan_only_holes_are_zero(tmp_path: Path) -> None:
    with opened(chain(tmp_path)) as view:
        end = view.layers[0].extents.stops[-1]
        assert list(entries(view, 0, SIZE)) == [
            MapEntry(0, 3 * PAGE, 0, False),
            MapEntry(3 * PAGE, 6 * PAGE, 1, False),
            MapEntry(6 * PAGE, end, 0, False),
            MapEntry(end, SIZE, None, True),
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
            MapEntry(end, SIZE, None, True),
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
        list(scanned_entries(view, 100, SIZE, PAGE, done.append))
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
        scanning = scanned_entries(view, 0, SIZE, PAGE, lambda done: None)
        next(scanning)
        paths[0].write_bytes(bytes(SIZE))
        with pytest.raises(LayerChangedError, match="base"):
            list(scanning)
