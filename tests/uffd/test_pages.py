"""Huge pages, holes in a large image, and storage that hangs."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support import hugepages
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.pageservers import serving
from tests.support.vmm import HUGE, Vmm

SIZE = 4 * HUGE
BASE = [(HUGE - PAGE, signed(0, HUGE - PAGE, 2 * PAGE))]
DIFF = [(HUGE, signed(1, HUGE, PAGE)), (SIZE - PAGE, signed(1, SIZE - PAGE, PAGE))]
ORACLE = overlay_oracle(SIZE, [BASE, DIFF])


@pytest.fixture
def options(tmp_path: Path) -> list[str | Path]:
    base = write_layer(tmp_path / "base", SIZE, BASE)
    return ["--base", base, "--diff", write_layer(tmp_path / "diff", SIZE, DIFF)]


def test_huge_pages_hold_the_image(options: list[str | Path], tmp_path: Path) -> None:
    with ExitStack() as stack:
        stack.enter_context(hugepages.reserved(8))
        server = stack.enter_context(serving(tmp_path / "socket", *options))
        vmm = stack.enter_context(Vmm(HUGE, SIZE - HUGE, page=HUGE))
        vmm.connect(server.socket)
        assert vmm.digest(0, SIZE) == hashlib.sha256(ORACLE).hexdigest()
        vmm.give_away(HUGE, HUGE)
        assert vmm.read(HUGE, HUGE) == bytes(HUGE)
        assert vmm.read(SIZE - PAGE, PAGE) == ORACLE[-PAGE:]


def test_huge_pages_are_recorded_and_copied_ahead(
    options: list[str | Path], tmp_path: Path
) -> None:
    sets: list[str | Path] = ["--working-set-dir", tmp_path / "sets"]
    with hugepages.reserved(8):
        with serving(tmp_path / "socket", *options, "--record", *sets) as server:
            with Vmm(SIZE, page=HUGE) as vmm:
                vmm.connect(server.socket)
                assert vmm.read(HUGE, PAGE) == ORACLE[HUGE:][:PAGE]
            # A quarter of the image at most is recorded.
            server.wait_for(f"recorded the first touch of {HUGE} bytes in 1 range")
        again = serving(tmp_path / "socket", *options, *sets)
        with again as server, Vmm(SIZE, page=HUGE) as vmm:
            vmm.connect(server.socket)
            assert vmm.digest(0, SIZE) == hashlib.sha256(ORACLE).hexdigest()
