"""What a mount knows of each tag, and of the files beside it, after a look at its source."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from diffmergefs.core.beneath import AllowedRoots
from diffmergefs.core.errors import (
    DiffMergeError,
    FileAccessError,
    LayerChangedError,
    counted,
    one_line,
)
from diffmergefs.core.identity import FileKey, FileVersion
from diffmergefs.core.view import MergedView
from diffmergefs.fuse.access import Access, view_access
from diffmergefs.fuse.nodes import OpenImage
from diffmergefs.stores.catalog import Catalog
from diffmergefs.stores.snapshot import Snapshot, StoredFile

log = logging.getLogger(__name__)

#: What a view of a chain depends on, for each layer: its content, the records beside it, the hash
#: that its parent must have, and what makes it doubtful that the lowest layer is a base.
Keys = list[tuple[FileKey, frozenset[tuple[str, FileKey]], str | None, str | None]]

# A question about a layer's file, and its answer.
Question = Callable[[StoredFile], bool]
Answers = dict[tuple[Question, FileKey], bool]


@dataclass(eq=False)
class TagState:
    """What a mount knows of one tag, as long as its chain has the same content.

    `links` are the snapshots of its chain, base first; there are none if it cannot be served.
    `logged` is the last log line about it. `image` is the open image, `refusal` the error with
    which its layers were refused, `complaint` the last other reason why they could not be opened.
    """

    tag: str
    keys: Keys
    links: Sequence[Snapshot] = ()
    logged: str = ""
    image: OpenImage | None = None
    refusal: DiffMergeError | None = None
    complaint: str = ""

    def __getstate__(self) -> dict[str, object]:
        # Another process opens the image, or finds the refusal, itself.
        return {**vars(self), "image": None, "refusal": None}

    def opened(self) -> OpenImage | None:
        """The image if it is open. Raises the error with which the layers were refused."""
        if (refusal := self.refusal) is not None:
            raise refusal.anew()
        return self.image

    def complain(self, error: OSError | DiffMergeError) -> DiffMergeError:
        """The error for clients, since the image cannot be opened now.

        Its errno is EBUSY if a layer changed or was replaced since the look, and ENOENT if it is
        gone, because the next look deals with both. The log gets the reason once, however often
        clients try.
        """
        text = str(error)
        if text != self.complaint:
            log.warning("%s: cannot be opened now: %s", self.tag, text)
        self.complaint = text
        if isinstance(error, OSError):
            cause: BaseException | None = error
            answer: DiffMergeError = FileAccessError(f"{self.tag}: {error.strerror}")
        else:
            cause, answer = error.__cause__, error.anew()
        number = cause.errno if isinstance(cause, OSError) else None
        if isinstance(error, LayerChangedError) or number == errno.ESTALE:
            answer.errno = errno.EBUSY
        elif number == errno.ENOENT:
            answer.errno = errno.ENOENT
        return answer

    def name_and_access(self, view: MergedView, roots: AllowedRoots) -> tuple[str, Access]:
        """The name of the memory file, and who may read this view of the chain; blocks.

        A layer that is shared or was renamed was opened by another path than this chain's. Who may
        read the view depends on where its layers are now. Raises OSError.
        """
        paths = [link.layer.path for link in self.links]
        return os.path.basename(paths[-1]), view_access(view.layers, roots, paths)

    def renewed(self, image: OpenImage, roots: AllowedRoots) -> OpenImage | None:
        """The image as it may be served now, or None if its layers changed or moved; blocks."""
        if any(layer.tainted for layer in image.view.layers):
            return None
        try:
            name, access = self.name_and_access(image.view, roots)
        except OSError:
            return None
        if (name, access) == (image.name, image.access):
            return image
        return OpenImage.of(image.view, name, access, self.tag)

    def holds_for_some(self, ask: Question, answers: Answers) -> bool:
        """Whether the answer is yes for a layer of the chain; blocks.

        `answers` keeps the answers, so that a layer which several chains share is asked about once.
        """
        # The newest layer comes first, because that is the one which a VMM writes.
        for link in reversed(self.links):
            asked = ask, link.layer.key
            if asked not in answers:
                try:
                    answers[asked] = ask(link.layer)
                except (OSError, DiffMergeError):
                    answers[asked] = False  # the next `open` reports the error
            if answers[asked]:
                return True
        return False


@dataclass(frozen=True)
class Look:
    """The result of one look at a store. It never changes, except for the states of its tags.

    `tags` are those that are served or broken. `device_state` is that of `Watch`. `named` are the
    directories below the root whose existence the names of tags reveal.
    """

    catalog: Catalog
    tags: Mapping[str, TagState] = field(default_factory=dict)
    device_state: Mapping[str, FileVersion | None] = field(default_factory=dict)
    named: frozenset[Access] = frozenset()

    def require_seen(self, path: str, status: os.stat_result) -> None:
        """Raise OSError (EBUSY) for device state that may belong to another memory than the served.

        That is a file that is not the one which this look saw, or that was replaced since the look
        before. Files that belong to no memory pass. `status` is of the file at `path`.
        """
        if path in self.device_state and self.device_state[path] != FileVersion.of(status):
            raise OSError(errno.EBUSY, "it changed since it was looked at; try again", path)


def states_after(
    before: Mapping[str, TagState],
    catalog: Catalog,
    chains: Mapping[str, list[Snapshot]],
    unsettled: set[str],
) -> dict[str, TagState]:
    """The state of each tag after a look that found these chains, and a log line for each change.

    A tag whose chain has the same content as before keeps its state.
    """
    texts = {tag: f"shown, {counted(len(links), 'layer')}" for tag, links in chains.items()}
    for tag in catalog.snapshots.keys() - chains.keys() - unsettled:
        try:
            catalog.chain(tag)
        except DiffMergeError as error:
            texts[tag] = f"not shown: {error}"
    states = {}
    for tag, text in texts.items():
        known, links = before.get(tag), chains.get(tag, [])
        if known is None or known.logged != text:
            log.log(logging.INFO if links else logging.WARNING, "%s: %s", one_line(tag), text)
        keys = [(s.layer.key, s.layer.records, s.parent_hash, s.doubt) for s in links]
        state = known if known is not None and known.keys == keys else TagState(tag, keys)
        state.links, state.logged = links, text
        states[tag] = state
    for tag in before.keys() - states.keys() - unsettled:
        log.info("%s: gone", one_line(tag))
    return states
