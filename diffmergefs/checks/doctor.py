"""How a filesystem treats diffs, and whether those of a path give right bytes on it."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from typing import BinaryIO

from diffmergefs.checks.diagnosis import HOLES, Finding, examine_layer, wrong
from diffmergefs.core import sparse
from diffmergefs.core.beneath import closing_fd
from diffmergefs.core.errors import DiffMergeError, FileAccessError, ForeignFormatError
from diffmergefs.core.extents import PAGE, ExtentList
from diffmergefs.core.failures import Target, failures
from diffmergefs.core.layer import Layer
from diffmergefs.core.sparse import BLOCK
from diffmergefs.opening.content import Parents, Verdicts
from diffmergefs.opening.filesystems import untrusted_filesystem
from diffmergefs.opening.images import require_known_base
from diffmergefs.opening.opener import Opener, opened_store
from diffmergefs.opening.trust import TrustPolicy, grain
from diffmergefs.opening.writers import Writers, writers
from diffmergefs.sidecars.verified import Remembered
from diffmergefs.stores.catalog import Catalog, read_catalog
from diffmergefs.stores.lookup import find_image, layout_of
from diffmergefs.stores.snapshot import Snapshot
from diffmergefs.system.mounttable import mount_of
from diffmergefs.writing.copying import clone_file

_SIZE = 16 << 20
_MIDDLE = 8 << 20  # on a border of any page, huge ones too
_STORED = 12 << 20
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23

_COARSE = (
    "clean memory beside a written page would count as written: a view, and flatten, would show old"
    " bytes or zeros there"
)
_ELSEWHERE = "take diffs on ext4, xfs or btrfs with 4 KiB blocks, or on tmpfs without huge pages"


def examine_path(
    path: str, policy: TrustPolicy | None = None, tested: set[int] | None = None
) -> Iterator[Finding]:
    """The findings on a directory of snapshots, a snapshot or layer in one, or any other path.

    First on the filesystem (see `examine_filesystem`), then on each layer of the whole
    directory or of the snapshot's chain. A file that is not a layer of a directory of snapshots is
    checked as a diff with unknown parents. For a directory without snapshots only the filesystem is
    checked. The device of a filesystem that was tested is added to `tested`; one that is in it
    already is not tested again. Only `page_size`, `allow_outside`, `allow_gaps` and `state_dir` of
    `policy` are used: nothing is overridden here. No finding ends the checks. Layers are synced and
    walked; a sealed layer is compared with its seal, and the result is remembered. No layer is
    written. Raises FileAccessError, BrokenChainError if a directory is ambiguous, and
    ForeignFormatError if it is in a format that is declined.
    """
    policy = replace(policy or TrustPolicy(), no_seal=True)
    with failures(path):
        folder = path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))
        os.stat(path)
        device = os.stat(folder).st_dev
        is_known = tested is not None and device in tested
        on_filesystem = [] if is_known else list(examine_filesystem(folder, policy.page_size))
    if tested is not None and not any(finding.check == "probe" for finding in on_filesystem):
        tested.add(device)
    found = _snapshots_of(path, policy)
    yield from on_filesystem
    if found is not None:
        yield from _examine_snapshots(*found, policy)
    elif not os.path.isdir(path):
        yield from _examine_file(path, policy)
    else:
        yield Finding(path, "snapshots", "fine", "no snapshots here, so only its filesystem counts")


def _snapshots_of(path: str, policy: TrustPolicy) -> tuple[Catalog, list[str]] | None:
    # The catalog of the path, or of its directory, and the tags to check, parents first.
    if os.path.isdir(path):
        catalog = read_catalog(path, options=policy)
        if catalog.snapshots:
            depths = {tag: len(catalog.reachable(tag)) for tag in catalog.snapshots}
            return catalog, sorted(depths, key=lambda tag: (depths[tag], tag))
        if layout_of(os.path.realpath(path)) is None:
            return None
    with suppress(FileAccessError, ForeignFormatError):  # _examine_file reports it
        catalog, tag = find_image(path, policy)
        return catalog, [link.tag for link in catalog.reachable(tag)]
    return None


def _examine_snapshots(
    catalog: Catalog, tags: Sequence[str], policy: TrustPolicy
) -> Iterator[Finding]:
    with opened_store(catalog.root, policy, os.path.abspath(catalog.root)) as pool:
        layers: dict[str, Layer] = {}
        for tag in tags:
            snapshot = catalog.snapshots[tag]
            subject = _subject(catalog, snapshot)
            yield from _failure(subject, "chain", partial(catalog.chain, tag))
            try:
                layer = layers[tag] = pool.layer(snapshot.layer)
            except DiffMergeError as error:
                if snapshot.memory is not None:
                    yield wrong(subject, "access", error)
                continue
            known_base = partial(require_known_base, layer, snapshot.doubt, policy)
            yield from (in_doubt := _failure(layer.path, "chain", known_base))
            below = catalog.reachable(tag)[:-1]
            known = [layers[link.tag] for link in below if link.tag in layers]
            is_complete = len(known) == len(below) and (known or snapshot.parent is None)
            parents = Parents(known) if is_complete and not in_doubt else None
            path = snapshot.layer.path
            yield from examine_layer(layer, parents, policy, pool.verdicts, pool.roots, path)


def _subject(catalog: Catalog, snapshot: Snapshot) -> str:
    name = snapshot.memory.path if snapshot.memory else snapshot.folder or snapshot.tag
    return os.path.join(os.path.abspath(catalog.root), name)


def _failure(subject: str, check: str, run: Callable[[], object]) -> list[Finding]:
    try:
        run()
    except DiffMergeError as error:
        return [wrong(subject, check, error)]
    return []


def _examine_file(path: str, policy: TrustPolicy) -> Iterator[Finding]:
    try:
        layer = Opener(policy).open(path, is_diff=True)
    except DiffMergeError as error:
        yield wrong(path, "access", error)
        return
    with closing(layer):
        verdicts = Verdicts(Remembered(policy.state_dir))
        yield from examine_layer(layer, None, policy, verdicts)


def examine_filesystem(folder: str, page: int = PAGE) -> Iterator[Finding]:
    """How the filesystem of the directory `folder` treats diffs of pages of `page` bytes.

    Tested with a temporary file there: 16 MiB long, with one written page, and without a name (it
    briefly has one if the filesystem requires that). Is only that page reported as data? Is a page
    of written zeros data too, and a page stored through a mapping? Does a page that is read through
    a mapping stay a hole? Can a file share another's blocks? Does a lease show writers? If nothing
    can be written, only metadata are used. Raises OSError if `folder` cannot be opened.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    with closing_fd(os.open(folder, flags)) as fd:
        yield _type(folder, fd)
        unit = grain(fd)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            yield from _tried(folder, file, page)
    except OSError as error:
        yield Finding(
            folder,
            "probe",
            "warning",
            f"holes could not be tested: {error.strerror}",
            f"only its block size of {unit} bytes hints at how holes are reported",
            "run doctor as a user who can write there",
        )


def _type(folder: str, fd: int) -> Finding:
    reason, mount = _untrusted(folder, fd), mount_of(fd)
    if reason is None:
        kind = mount.kind if mount else "unknown"
        return Finding(folder, "filesystem", "fine", f"a filesystem of type {kind}")
    return Finding(folder, "filesystem", "wrong", reason, HOLES, _ELSEWHERE)


def _untrusted(folder: str, fd: int) -> str | None:
    # On an overlay new files lie in the upper directory. So does `folder` once a file was made in
    # it; if it is not found there, the file decides.
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return untrusted_filesystem(fd) and untrusted_filesystem(file.fileno())
    except OSError:
        return untrusted_filesystem(fd)


def _tried(folder: str, file: BinaryIO, page: int) -> Iterator[Finding]:
    fd, finding = file.fileno(), partial(Finding, folder)
    os.ftruncate(fd, _SIZE)
    os.pwrite(fd, b"\xa5" * page, _MIDDLE)
    written = _extents(fd)
    if written == ExtentList([(_MIDDLE, _MIDDLE + page)]):
        yield finding("grain", "fine", f"one written page of {page} bytes is {page} bytes of data")
    else:
        text = f"one written page of {page} bytes, but"
        text += f" {written.data_bytes} bytes of data are reported"
        yield finding("grain", "wrong", text, _COARSE, _ELSEWHERE)
    yield _zeros(folder, fd, page, written)
    if written.data_bytes == page:
        yield from _mappings(folder, fd, page)
    yield _reflink(folder, fd)
    yield _leases(folder, file)


def _extents(fd: int) -> ExtentList:
    os.fsync(fd)
    return ExtentList(sparse.data_extents(fd, _SIZE))


def _zeros(folder: str, fd: int, page: int, before: ExtentList) -> Finding:
    os.pwrite(fd, bytes(page), 0)
    if _extents(fd).data_bytes > before.data_bytes or before.covers(_SIZE):
        return Finding(folder, "zeros", "fine", "a page of written zeros stays data")
    return Finding(
        folder,
        "zeros",
        "wrong",
        "a page of written zeros becomes a hole",
        "memory that a guest cleared would show its parent's old bytes",
        _ELSEWHERE,
    )


def _mappings(folder: str, fd: int, page: int) -> Iterator[Finding]:
    # The kernel stores and loads the pages itself, so a full filesystem is an error here and not a
    # SIGBUS. Kernels before Linux 5.14 cannot.
    unit = max(page, mmap.PAGESIZE)
    for offset in range(0, _SIZE, BLOCK):
        os.pread(fd, BLOCK, offset)
    with suppress(OSError), mmap.mmap(fd, _SIZE) as memory:
        before = _extents(fd).data_bytes
        memory.madvise(_MADV_POPULATE_WRITE, _STORED, unit)
        stored = _extents(fd).data_bytes - before
        memory.madvise(_MADV_POPULATE_READ, _SIZE - unit, unit)
        loaded = _extents(fd).data_bytes - before - stored
        yield Finding(folder, "mappings", "fine", _exactness(unit, stored))
        if loaded:
            yield Finding(
                folder,
                "readers",
                "warning",
                "a process that maps a diff and reads a hole turns the hole into written zeros",
                "reading a diff without a seal is enough to hide what its parent has there",
                "diffmergefs seal FILE, as the last step of taking a diff",
            )


def _exactness(unit: int, stored: int) -> str:
    # The page cache has larger units, and a store may turn a whole unit into data.
    if stored == unit:
        return "exact with write(2), and through mappings"
    return (
        f"exact with write(2), not through mappings: a store of {unit} bytes into a file that was"
        f" read before makes {stored} bytes data, so VMMs should use write(2) for diffs"
    )


def _reflink(folder: str, fd: int) -> Finding:
    with closing(Layer(folder, os.dup(fd))) as layer:
        try:
            with tempfile.TemporaryFile(dir=folder) as other:
                os.ftruncate(other.fileno(), _SIZE)
                shared = clone_file(layer, Target(other.fileno(), folder))
            text = "no reflink: flatten copies each byte here"
            text = "flatten shares blocks here (reflink)" if shared else text
        except DiffMergeError as error:
            text = f"blocks cannot be shared: {error}"
    return Finding(folder, "reflink", "fine", text)


def _leases(folder: str, file: BinaryIO) -> Finding:
    # A lease needs a descriptor that is open for reading only.
    path = f"/proc/self/fd/{file.fileno()}"
    with closing_fd(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as reader:
        with_writer = writers(reader)
        file.close()
        without = writers(reader)
    if (with_writer, without) == (Writers.SOME, Writers.NONE):
        return Finding(folder, "lease", "fine", "a lease shows whether a process writes to a file")
    return Finding(
        folder,
        "lease",
        "warning",
        f"a lease does not show whether a process writes to a file: for one that is open for"
        f" writing it says '{with_writer.value}', once it is closed '{without.value}'",
        "a diff that its VMM still writes to looks like a finished one",
        "mount and flatten only what its VMM has closed",
    )
