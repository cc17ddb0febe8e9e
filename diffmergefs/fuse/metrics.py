"""What a mount counts of itself: numbers only, cheap enough for every request."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection

#: The counts of tags that are no more, together: no tag has parentheses.
GONE = "(gone)"
_BUCKETS = 65


class Metrics:
    """Counters that only grow, from zero at the mount. For one thread: the event loop's.

    `requests` is by operation, `errors` by operation and errno. `supplied` is, by tag, how many
    bytes each layer of the chain has supplied to reads, by its position (0 is the base;
    `view.HOLE`: zeros that no layer supplied). `waited` counts the reads that went to a thread,
    because not all of their bytes were in the page cache. `fast_loop` is no counter: whether the
    fast read loop is in force (`readloop`).
    """

    __slots__ = (
        *("errors", "fast_loop", "read_buckets", "read_ns"),
        *("requests", "started", "supplied", "waited"),
    )

    def __init__(self) -> None:
        self.started = time.time()
        self.requests: defaultdict[str, int] = defaultdict(int)
        self.errors: defaultdict[tuple[str, int], int] = defaultdict(int)
        self.supplied: dict[str, dict[int, int]] = {}
        self.waited = 0
        self.fast_loop = False
        self.read_ns = 0
        self.read_buckets = [0] * _BUCKETS

    def of_tag(self, tag: str) -> dict[int, int]:
        """The entry of `supplied` for this tag; good until `fold` is not told of it."""
        return self.supplied.setdefault(tag, {})

    def read(self, nanoseconds: int, supplied: dict[int, int], totals: dict[int, int]) -> None:
        """Count a read of a view that took so long and got so many bytes from each layer.

        `totals` is what `of_tag` gave. Bucket n of `read_buckets` holds the reads that took more
        than 2**(n - 1) and at most 2**n nanoseconds.
        """
        self.read_ns += nanoseconds
        self.read_buckets[(nanoseconds - 1).bit_length() if nanoseconds > 0 else 0] += 1
        for layer, count in supplied.items():
            totals[layer] = totals.get(layer, 0) + count

    def fold(self, tags: Collection[str]) -> None:
        """Add up under `GONE` what was supplied to all tags but these, so that it cannot grow."""
        for tag in self.supplied.keys() - {*tags, GONE}:
            totals = self.of_tag(GONE)
            for layer, count in self.supplied.pop(tag).items():
                totals[layer] = totals.get(layer, 0) + count
