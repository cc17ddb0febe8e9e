"""Which bytes are asked of which file, by preadv itself."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Each read from here on, of this process: the file's name, the offset, the length."""
    calls: list[tuple[str, int, int]] = []
    preadv = os.preadv

    def recorded(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
        calls.append((name, offset, sum(len(b) for b in buffers)))
        return preadv(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", recorded)
    return calls
