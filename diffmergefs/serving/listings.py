"""What open directories are read from: names, kept once for all who opened a directory alike."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Hashable

MAX_BYTES = 64 << 20
_OVERHEAD = 48  # bytes that Python takes for a name besides its own


class Listing:
    """The names in a directory, in the order in which they are read."""

    __slots__ = ("__weakref__", "names")

    def __init__(self, names: tuple[bytes, ...]) -> None:
        self.names = names


class Listings:
    """The listings that are in use; not safe to use from several threads.

    All of them together take at most `limit` bytes, however many directories are open and however
    they change: but for a first one, whatever its size.
    """

    def __init__(self, limit: int = MAX_BYTES) -> None:
        self._limit = limit
        self._taken = 0
        self._newest: weakref.WeakValueDictionary[Hashable, Listing] = weakref.WeakValueDictionary()

    def shared(self, folder: Hashable, names: tuple[bytes, ...]) -> Listing:
        """A listing of these names, the one in use if there is one; it counts as long as it lives.

        Raises OSError (ENFILE) where there is no room for another one.
        """
        known = self._newest.get(folder)
        if known is not None and known.names == names:
            return known
        size = sum(map(len, names)) + _OVERHEAD * len(names)
        if self._taken and self._taken + size > self._limit:
            raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))
        listing = self._newest[folder] = Listing(names)
        self._taken += size
        weakref.finalize(listing, self._give_back, size)
        return listing

    def _give_back(self, size: int) -> None:
        self._taken -= size
