"""The table: a row is a place, how the diff was written, what happened to it, what must be."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from tests.filesystems.wrong_bytes import places
from tests.filesystems.wrong_bytes.diffs import (
    Act,
    change_of_mode,
    copied_and_written_again,
    flattened_and_written_again,
    in_allocations_of_64_kib,
    nothing,
    page_written_later,
    read_and_dropped,
    read_by_somebody,
    scattered_pages,
    stored_through_a_mapping,
)
from tests.filesystems.wrong_bytes.places import (
    Place,
    directly,
    fuse,
    in_a_container,
    lower,
    packed,
    read_only,
    upper,
)
from tests.support.reserved import mapped

RIGHT = "right"


@dataclass(frozen=True)
class Row:
    """A diff that is `written` at a place, to which something happens `later`, where it is read.

    `must` is RIGHT, or the name of the check that refuses it `meanwhile`. The commands get
    `options`.
    """

    place: Place
    written: Act = scattered_pages
    later: Act = nothing
    meanwhile: Callable[[Path], AbstractContextManager[object]] = nullcontext
    must: str = RIGHT
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What the test's output calls it."""
        acts = [act.__name__ for act in (self.written, self.later) if act is not nothing]
        acts += [self.meanwhile.__name__] if self.meanwhile is not nullcontext else []
        return " ".join([self.place.name, *acts, *self.options])


TABLE = [
    # Filesystems that report holes exactly.
    *(Row(directly(kind)) for kind in ("ext4", "xfs", "btrfs", "tmpfs")),
    *(Row(directly(kind)) for kind in ("ext2", "ext3", "ext4_bigalloc")),
    Row(places.MEMFD),
    # Those that do not, or may not: by their names.
    Row(packed("squashfs"), must="filesystem"),
    Row(packed("erofs"), must="filesystem"),
    *(
        Row(directly(f"tmpfs_{huge}"), must="filesystem")
        for huge in ("huge", "within_size", "advise")
    ),
    Row(places.RAMFS, must="filesystem"),
    Row(places.FUSE_OVERLAYFS, must="filesystem"),
    *(Row(fuse(statfs=statfs), must="filesystem") for statfs in (True, False)),
    # A coarse grain, and blocks that are stored before they are written.
    Row(directly("xfs16k"), must="grain"),
    Row(directly("xfs"), in_allocations_of_64_kib, must="unwritten"),
    # Blocks that are shared and written again: what xfs reserves around them is no data.
    *(
        Row(directly(kind), written, later)
        for kind in ("ext4", "xfs", "btrfs")
        for written in (copied_and_written_again, flattened_and_written_again)
        for later in (nothing, read_by_somebody, read_and_dropped)
    ),
    *(
        Row(directly(kind), copied_and_written_again, meanwhile=mapped)
        for kind in ("ext4", "btrfs")
    ),
    Row(directly("xfs"), copied_and_written_again, meanwhile=mapped, must="map"),
    Row(directly("xfs"), flattened_and_written_again, meanwhile=mapped, must="map"),
    *(
        Row(place, copied_and_written_again, read_by_somebody, meanwhile, must)
        for place in (lower(directly("xfs")), upper("xfs"))
        for meanwhile, must in ((nullcontext, RIGHT), (mapped, "map"))
    ),
    # Stores through a mapping of what is cached: ext4 and xfs fill holes, and no metadata tells.
    *(
        Row(directly(kind), later=stored_through_a_mapping, must="filled", options=("--strict",))
        for kind in ("ext4", "xfs")
    ),
    *(
        Row(directly(kind), later=stored_through_a_mapping, options=("--strict",))
        for kind in ("btrfs", "tmpfs")
    ),
    # Overlays: what stores the file counts.
    *(Row(upper(kind)) for kind in ("ext4", "xfs", "tmpfs")),
    Row(upper("ext4", packed("squashfs"))),
    Row(upper("tmpfs", packed("squashfs"))),
    Row(upper("tmpfs_huge", directly("ext4")), must="filesystem"),
    *(Row(lower(directly(kind))) for kind in ("ext4", "btrfs", "tmpfs")),
    *(Row(lower(packed(kind)), must="filesystem") for kind in ("squashfs", "erofs")),
    Row(lower(directly("tmpfs_advise")), must="filesystem"),
    Row(lower(lower(directly("xfs")))),
    Row(lower(lower(packed("squashfs"))), must="filesystem"),
    Row(lower(directly("ext4")), later=change_of_mode, must="copy-up"),
    Row(lower(directly("ext4")), later=page_written_later, must="copy-up"),
    Row(lower(directly("ext4"), "metacopy=on"), later=change_of_mode),
    Row(lower(packed("squashfs"), "metacopy=on"), later=change_of_mode, must="filesystem"),
    Row(upper("ext4"), later=page_written_later),
    # Where the overlay's directories cannot be looked into: FIEMAP passes through.
    *(Row(in_a_container(upper(kind))) for kind in ("ext4", "xfs", "btrfs")),
    Row(in_a_container(lower(directly("xfs")))),
    Row(in_a_container(upper("ext4", packed("squashfs")))),
    *(Row(in_a_container(lower(packed(k))), must="filesystem") for k in ("squashfs", "erofs")),
    Row(in_a_container(read_only(packed("erofs"))), must="filesystem"),
    Row(in_a_container(read_only(directly("ext4")))),
    Row(in_a_container(upper("tmpfs")), must="filesystem"),
]

#: Where a base may lie: anywhere.
BASES = [
    *(directly(kind) for kind in ("ext4", "xfs16k", "btrfs", "tmpfs_huge")),
    *(packed(kind) for kind in ("squashfs", "erofs")),
    lower(packed("squashfs")),
    places.FUSE_OVERLAYFS,
    places.RAMFS,
    fuse(statfs=True),
    fuse(statfs=False),
]
