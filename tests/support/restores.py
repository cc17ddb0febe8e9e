"""Images to record and to prefetch from, and a client's requests without a mount."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import strategies as st

from diffmergefs import open_chain
from diffmergefs.core.extents import Extent
from diffmergefs.fuse.access import Access
from diffmergefs.fuse.handles import Observer
from diffmergefs.fuse.nodes import OpenImage
from diffmergefs.prefetch.record import WorkingSet, WorkingSets, identity_of_view, now
from tests.support.images import PAGE, overlay_oracle, write_layer
from tests.support.stores import age, pages

#: Runs of pages, in any order, which may overlap.
RUNS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 12)).map(lambda r: Extent(r[0], r[0] + r[1])),
    max_size=30,
)

#: The pages of an image.
PAGES = 512
SIZE = PAGES * PAGE
_BASE, _DIFF = range(PAGES - 60), range(3, PAGES, 5)
ORACLE = overlay_oracle(SIZE, [pages(0, _BASE), pages(1, _DIFF)])


def write_pair(folder: Path) -> tuple[Path, Path]:
    """A base, and a diff over it, of SIZE bytes; merged they are ORACLE."""
    base = write_layer(folder / "base.mem", SIZE, pages(0, _BASE))
    diff = write_layer(folder / "diff.mem", SIZE, pages(1, _DIFF))
    age(base, diff)
    return base, diff


def shown(base: Path, diff: Path) -> OpenImage:
    """The image of the two, as a mount shows it."""
    return OpenImage.of(open_chain(base, [diff]).view, "base.mem", Access(0, 0, 0o400))


@pytest.fixture
def image(tmp_path: Path) -> OpenImage:
    return shown(*write_pair(tmp_path))


@pytest.fixture
def sets(tmp_path: Path) -> WorkingSets:
    return WorkingSets(str(tmp_path / "sets"))


def scattered(count: int, seed: int = 3) -> list[int]:
    """So many different pages in a random order."""
    return random.Random(seed).sample(range(PAGES), count)


def ranges_of(numbers: Iterable[int]) -> list[Extent]:
    """These pages as ranges, one each."""
    return [Extent(number * PAGE, (number + 1) * PAGE) for number in numbers]


def save(sets: WorkingSets, image: OpenImage, numbers: Iterable[int]) -> WorkingSet:
    """Record that these pages of the image were touched, in this order."""
    layers = identity_of_view(image.view)
    record = WorkingSet(layers, tuple(ranges_of(numbers)), now(), 4)
    sets.save(record)
    return record


class Client:
    """Opens, reads and closes as the adapter reports them to an observer."""

    _numbers = itertools.count(1)

    def __init__(
        self, observer: Observer, image: OpenImage, *, writing: bool = False, pid: int = 1
    ) -> None:
        self.observer = observer
        self.file = next(self._numbers)
        self.keeps_cache = observer.opened(self.file, 7, image, pid, writing=writing)

    def touch(self, *numbers: int) -> None:
        """Ask for these pages, one after the other."""
        for number in numbers:
            self.observer.read(self.file, number * PAGE, PAGE)

    def close(self) -> bool:
        """Close the file, do what is then to be done, and say whether there was anything."""
        work = self.observer.closed(self.file)
        if work is not None:
            work()
        return work is not None
