"""The table: a row is a place, how the diff was written, what happened to it, what must be."""

from __future__ import annotations

from dataclasses import dataclass

from tests.wrong_bytes import places
from tests.wrong_bytes.diffs import (
    Act,
    change_of_mode,
    nothing,
    page_written_later,
    scattered_pages,
)
from tests.wrong_bytes.places import Place, directly, fuse, lower, packed, upper

RIGHT = "right"


@dataclass(frozen=True)
class Row:
    """A diff that is `written` at a place, to which something happens `later`, where it is read.

    `must` is RIGHT, or the name of the check that refuses it. The commands get `options`.
    """

    place: Place
    written: Act = scattered_pages
    later: Act = nothing
    must: str = RIGHT
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What the test's output calls it."""
        acts = [act.__name__ for act in (self.written, self.later) if act is not nothing]
        return " ".join([self.place.name, *acts, *self.options])


TABLE = [
    # Filesystems that report holes exactly.
    *(Row(directly(kind)) for kind in ("ext4", "xfs", "btrfs", "tmpfs")),
    # Overlays.
    Row(upper("ext4")),
    Row(upper("xfs")),
    Row(lower(directly("ext4"))),
    Row(lower(directly("ext4")), later=change_of_mode, must="copy-up"),
    Row(lower(directly("ext4")), later=page_written_later, must="copy-up"),
    Row(upper("ext4"), later=page_written_later),
    # FUSE servers without lseek call all of a file data.
    *(Row(fuse(statfs=statfs), must="dense") for statfs in (True,)),
]

#: Where a base may lie: anywhere.
BASES = [
    *(directly(kind) for kind in ("ext4", "xfs16k", "btrfs", "tmpfs_huge")),
    *(packed(kind) for kind in ("squashfs", "erofs")),
    lower(packed("squashfs")),
    places.FUSE_OVERLAYFS,
    places.RAMFS,
    fuse(statfs=True),
]
