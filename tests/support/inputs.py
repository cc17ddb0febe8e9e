"""Proof that input files are only ever read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def unchanged(paths: Iterable[Path]) -> Iterator[None]:
    """Fail unless each file has the same size, mtime and content after as before.

    Nothing is compared when the body itself fails.
    """
    before = {path: _state(path) for path in paths}
    yield
    for path, state in before.items():
        after = _state(path)
        assert after == state, f"{path} changed: (size, mtime_ns, sha256) {state} -> {after}"


def _state(path: Path) -> tuple[int, int, str]:
    # The times first: reading changes the atime only, but must not hide a change.
    status = path.stat()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return status.st_size, status.st_mtime_ns, digest
