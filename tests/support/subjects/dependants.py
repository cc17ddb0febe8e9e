"""The diff and bases of the tests of what else uses a base."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffmergefs import apply_diff
from diffmergefs.core.errors import OutputRefusedError
from diffmergefs.opening.trust import TrustPolicy
from tests.support.images import overlay_oracle, write_layer
from tests.support.inputs import unchanged
from tests.support.stores import BASE_PAGES, SIZE, pages

BASE = pages(0, BASE_PAGES)
DIFF = pages(9, [9])
MERGED = overlay_oracle(SIZE, [BASE, DIFF])


@pytest.fixture
def diff(public_path: Path) -> Path:
    """A diff of one page, in a directory of its own."""
    (public_path / "diffs").mkdir()
    return write_layer(public_path / "diffs" / "mem_diff", SIZE, DIFF)


def base_at(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_layer(path, SIZE, BASE)


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
