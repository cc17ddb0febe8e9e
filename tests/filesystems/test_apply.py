"""apply on each file system, and across two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from diffmergefs.writing.apply import apply_diff
from tests.support.images import PAGE, overlay_oracle
from tests.support.inputs import unchanged
from tests.support.subjects.apply import SIZE, pages, pair


def test_each_filesystem(real_fs: Path) -> None:
    lower, upper = pages(0, 0, 1, 2), [*pages(1, 1, 9), (2 * PAGE, bytes(PAGE))]
    diff, base = pair(real_fs, lower, upper)
    with unchanged([diff]):
        assert apply_diff(diff, base) == 3 * PAGE
    assert base.read_bytes() == overlay_oracle(SIZE, [lower, upper])


def test_across_filesystems(tmp_path: Path, filesystem: Callable[[str], Path]) -> None:
    lower, upper = pages(0, 0, 1), pages(1, 1, 9)
    diff, _ = pair(tmp_path, lower, upper)
    _, base = pair(filesystem("tmpfs"), lower, upper)
    assert apply_diff(diff, base) == 2 * PAGE
    assert base.read_bytes() == overlay_oracle(SIZE, [lower, upper])
