"""The files of the tests of applying a diff, and of what forbids it."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffmergefs import apply_diff
from diffmergefs.core.errors import OutputRefusedError
from diffmergefs.opening.trust import TrustPolicy
from tests.support import stores
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.inputs import unchanged

Extents = list[tuple[int, bytes]]

SIZE = 16 * PAGE


def pages(layer: int, *numbers: int) -> Extents:
    """These pages of the layer, as extents of signed bytes."""
    return [(n * PAGE, signed(layer, n * PAGE, PAGE)) for n in numbers]


def pair(directory: Path, base: Extents, diff: Extents, size: int = SIZE) -> tuple[Path, Path]:
    """A diff and a base."""
    written = write_layer(directory / "diff.mem", size, diff)
    return written, write_layer(directory / "base.mem", size, base)


BASE = stores.pages(0, stores.BASE_PAGES)
DIFF = stores.pages(9, [9])
MERGED = overlay_oracle(stores.SIZE, [BASE, DIFF])


@pytest.fixture
def diff(public_path: Path) -> Path:
    """A diff of one page, in a directory of its own."""
    (public_path / "diffs").mkdir()
    return write_layer(public_path / "diffs" / "mem_diff", stores.SIZE, DIFF)


def base_at(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_layer(path, stores.SIZE, BASE)


def refusal(diff: Path, base: Path, policy: TrustPolicy | None = None) -> str:
    """Why `apply` leaves the base alone; it does."""
    with unchanged([diff, base]), pytest.raises(OutputRefusedError) as caught:
        apply_diff(diff, base, policy=policy)
    return str(caught.value)


def reasons(diff: Path, base: Path) -> list[str]:
    """The names of the reasons why it does, or none: then it is applied."""
    try:
        with unchanged([diff]):
            apply_diff(diff, base)
    except OutputRefusedError as error:
        return str(error).rpartition("--force=")[2].split(",")
    return []
