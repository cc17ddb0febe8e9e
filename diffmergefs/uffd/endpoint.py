"""Where VMs connect: one socket for an image, or a directory with a socket for each snapshot."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from diffmergefs.core.errors import DiffMergeError, OutputRefusedError, one_line
from diffmergefs.core.failures import failures
from diffmergefs.core.view import MergedView
from diffmergefs.fuse.served import Store
from diffmergefs.uffd.listener import Listener, Owner
from diffmergefs.uffd.vm import Plan

log = logging.getLogger(__name__)

#: What the name of a socket in a directory of sockets ends in.
SUFFIX = ".sock"


@dataclass(frozen=True, eq=False)
class Endpoint:
    """A socket, and how to serve who connects. `image` names what they get.

    `plan` may block, and raises DiffMergeError if the image cannot be served now.
    """

    listener: Listener
    image: str
    plan: Callable[[], Plan]


class News(NamedTuple):
    """The endpoints that came and went."""

    added: list[Endpoint]
    gone: list[Endpoint]


class SocketDirectory:
    """A socket `TAG.sock` in the directory `path` for each tag that `store` serves.

    The directory is made if it is not there. Those of a tag with slashes are made as needed, and
    removed with their last socket.
    `plan_of` says how a view is served. An image is opened when a VM connects to it. Whoever is
    connected keeps the image that was there then. `close()` removes all sockets. A socket that
    a dead server left is replaced if its tag is there. Raises FileAccessError, and
    OutputRefusedError if `path` lies in the store or leads there.
    """

    def __init__(
        self,
        store: Store,
        path: str,
        owner: Owner | None,
        plan_of: Callable[[MergedView], Plan],
    ) -> None:
        self.path = os.path.abspath(path)
        self._store = store
        self._owner = owner
        self._plan_of = plan_of
        self._endpoints: dict[str, Endpoint] = {}
        self._problems: dict[str, str] = {}
        self._folders: set[str] = set()  # those that were made here, below the directory
        self._is_closed = False
        self._lock = threading.Lock()
        self._require_outside(path)
        with failures(path):
            with suppress(FileExistsError):
                os.mkdir(path)
            os.close(os.open(path, os.O_PATH | os.O_DIRECTORY))

    def update(self) -> News:
        """Make sockets for new tags, and remove those of tags that are gone.

        A socket that cannot be made is logged once, and tried again with each call.
        """
        tags = set(self._store.tags())
        news = News([], [])
        with self._lock:
            if self._is_closed:
                return news
            for tag in sorted(self._endpoints.keys() - tags):
                endpoint = self._endpoints.pop(tag)
                self._remove(endpoint)
                news.gone.append(endpoint)
            for tag in self._problems.keys() - tags:
                del self._problems[tag]
            for tag in sorted(tags - self._endpoints.keys()):
                try:
                    endpoint = self._made(tag)
                except DiffMergeError as error:
                    if self._problems.get(tag) != str(error):
                        log.warning("%s: has no socket: %s", one_line(tag), error)
                    self._problems[tag] = str(error)
                    continue
                self._problems.pop(tag, None)
                self._endpoints[tag] = endpoint
                news.added.append(endpoint)
        return news

    def watch(self, seconds: float, tell: Callable[[News], None]) -> None:
        """Look at the store again and again, and give what is new. Returns after `close`."""
        problem = ""
        while not self._is_closed:
            time.sleep(seconds)
            try:
                self._store.look()
                problem = ""
            except DiffMergeError as error:
                if str(error) != problem:
                    log.warning("the sockets stay as they were until this is fixed: %s", error)
                problem = str(error)
                continue
            except Exception:
                log.exception("looking at the source failed: this is a bug")
                continue
            news = self.update()
            if any(news):
                tell(news)

    def close(self) -> None:
        """Remove all sockets. Those who have connected are served on."""
        with self._lock:
            self._is_closed = True
            for endpoint in self._endpoints.values():
                self._remove(endpoint)
            self._endpoints.clear()

    def _require_outside(self, path: str) -> None:
        root = os.path.realpath(self._store.root)
        if os.path.commonpath([os.path.realpath(path), root]) == root:
            raise OutputRefusedError(
                f"{path}: lies in {self._store.root}, where nothing may be made; choose a directory"
                " elsewhere"
            )

    def _made(self, tag: str) -> Endpoint:
        path = os.path.join(self.path, tag + SUFFIX)
        folder = os.path.dirname(path)
        self._require_outside(folder)
        try:
            with failures(path):
                self._make_folders(folder)
            listener = Listener(path, self._owner)
        except DiffMergeError:
            self._remove_folders(folder)
            raise
        return Endpoint(listener, tag, _Latest(self._store, tag, self._plan_of))

    def _make_folders(self, folder: str) -> None:
        if folder != self.path and not os.path.isdir(folder):
            self._make_folders(os.path.dirname(folder))
            os.mkdir(folder)
            self._folders.add(folder)

    def _remove(self, endpoint: Endpoint) -> None:
        endpoint.listener.close()
        self._remove_folders(os.path.dirname(endpoint.listener.path))

    def _remove_folders(self, folder: str) -> None:
        with suppress(OSError):  # it holds other sockets
            while folder in self._folders:
                os.rmdir(folder)
                self._folders.discard(folder)
                folder = os.path.dirname(folder)


class _Latest:
    # The plan for the image that a tag has now, one for all VMs that share the image.

    def __init__(self, store: Store, tag: str, plan_of: Callable[[MergedView], Plan]) -> None:
        self._store, self._tag, self._plan_of = store, tag, plan_of
        self._lock = threading.Lock()
        # Not kept for its own sake: it would keep an image open that was replaced.
        self._known: Callable[[], Plan | None] = lambda: None

    def __call__(self) -> Plan:
        view = self._store.open(self._tag).view
        with self._lock:
            known = self._known()
            if known is None or known.view is not view:
                known = self._plan_of(view)
                self._known = weakref.ref(known)
            return known
