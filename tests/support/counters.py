"""What a mount's status tells beside its counters, where a test asks for the counters alone."""

from __future__ import annotations

from typing import TypedDict


class Beside(TypedDict):
    """The keyword arguments of `status_of`."""

    pushed_bytes: int
    hit_bytes: int
    images: int
    files: int


NOTHING = Beside(pushed_bytes=0, hit_bytes=0, images=0, files=0)
