"""What open directories and documents are read from, kept once for all who opened the same one."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Hashable

MAX_BYTES = 64 << 20
_OVERHEAD = 48  # bytes that Python takes for a part besides its own


class Content:
    """The names in a directory, in the order in which they are read, or one text."""

    __slots__ = ("__weakref__", "parts")

    def __init__(self, parts: tuple[bytes, ...]) -> None:
        self.parts = parts


class Contents:
    """The contents that are in use; not safe to use from several threads.

    All of them together take at most `limit` bytes, however much is open and however it changes:
    but for a first one, whatever its size.
    """

    def __init__(self, limit: int = MAX_BYTES) -> None:
        self._limit = limit
        self._taken = 0
        self._newest: weakref.WeakValueDictionary[Hashable, Content] = weakref.WeakValueDictionary()

    def shared(self, of: Hashable, *parts: bytes) -> Content:
        """A content of these parts, the one in use if there is one; it counts as long as it lives.

        `of` says what is read. Raises OSError (ENFILE) where there is no room for another one.
        """
        known = self._newest.get(of)
        if known is not None and known.parts == parts:
            return known
        size = sum(map(len, parts)) + _OVERHEAD * len(parts)
        if self._taken and self._taken + size > self._limit:
            raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))
        content = self._newest[of] = Content(parts)
        self._taken += size
        weakref.finalize(content, self._give_back, size)
        return content

    def _give_back(self, size: int) -> None:
        self._taken -= size
