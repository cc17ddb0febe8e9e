"""Hashes that are taken beside those who ask for them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from typing import Any

from diffmergefs.core import background
from diffmergefs.core.errors import DiffMergeError
from diffmergefs.core.identity import FileKey
from diffmergefs.stores.snapshot import StoredFile

log = logging.getLogger(__name__)


class HashQueue:
    """Hashes stored files one after another, in a thread of its own; safe for several threads.

    `content_hash` gives the hash of one, and may block and raise DiffMergeError or OSError: then
    the reason is logged once, and the file is tried again when it is next asked for, after the
    others. The end of the process does not wait for the thread.
    """

    def __init__(self, content_hash: Callable[[StoredFile], str]) -> None:
        self._content_hash = content_hash
        self._known: dict[FileKey, str] = {}
        self._waiting: dict[FileKey, StoredFile] = {}
        self._failures: dict[FileKey, str] = {}
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def ask(self, file: StoredFile) -> str | None:
        """The hash of the file, or None as long as it is not known. Never blocks."""
        with self._lock:
            if (digest := self._known.get(file.key)) is not None:
                return digest
            self._waiting[file.key] = file
            if self._thread is None or not self._thread.is_alive():
                # Without one it is asked for again at the next look.
                self._thread = background.started(self._hash_all, "hashes")
        return None

    def forget_all_but(self, keys: Collection[FileKey]) -> None:
        """Forget whatever is known of other files than these."""
        tables: tuple[dict[FileKey, Any], ...] = (self._known, self._waiting, self._failures)
        with self._lock:
            for table in tables:
                for key in table.keys() - keys:
                    del table[key]

    def _hash_all(self) -> None:
        while file := self._next():
            try:
                self._hash(file)
            finally:
                with self._lock:
                    self._waiting.pop(file.key, None)

    def _next(self) -> StoredFile | None:
        with self._lock:
            if not self._waiting:
                self._thread = None  # in one step, or what is asked for just now would lie
                return None
            return next(iter(self._waiting.values()))

    def _hash(self, file: StoredFile) -> None:
        try:
            digest = self._content_hash(file)
        except (OSError, DiffMergeError) as error:
            with self._lock:
                is_news = str(error) != self._failures.get(file.key)
                self._failures[file.key] = str(error)
            if is_news:
                log.warning("%s: its hash cannot be found: %s", file.path, error)
            return
        with self._lock:
            self._known[file.key] = digest
