"""`flatten` against the oracle, on real filesystems, and in everything that can go wrong."""

from __future__ import annotations

import errno
import os
import re
import signal
import stat
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmergefs.core import sparse
from diffmergefs.core.errors import (
    DiffMergeError,
    FileAccessError,
    LayerChangedError,
    NoSpaceError,
    OutputRefusedError,
    VerificationError,
)
from diffmergefs.core.layer import Layer
from diffmergefs.core.sparse import BLOCK
from diffmergefs.core.view import MergedView
from diffmergefs.writing import copying
from diffmergefs.writing.flatten import flatten
from tests.support.calls import first
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.inputs import unchanged
from tests.support.subjects.flatten import (
    ORACLE,
    SIZE,
    VISIBLE,
    Extents,
    Space,
    chain,
    change,
    data_of,
    data_of_view,
    open_view,
    os_error,
    out,
    write_chain,
)

__all__ = ["chain", "out"]


def no_litter(out: Path) -> bool:
    return list(out.parent.iterdir()) == []


def fail_at(
    monkeypatch: pytest.MonkeyPatch, name: str, call: int, error: BaseException, module: Any = os
) -> None:
    """Have the `call`th call of `module.name` raise the error."""
    original, calls = getattr(module, name), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == call:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, failing)


def no_kernel_copy(monkeypatch: pytest.MonkeyPatch, number: int = errno.EXDEV) -> None:
    def refused(*args: Any) -> int:
        raise os_error(number)

    monkeypatch.setattr(os, "copy_file_range", refused)


FLATTEN = sys.modules["diffmergefs.writing.flatten"]


def copy_in_kernel(monkeypatch: pytest.MonkeyPatch, size: int = PAGE) -> None:
    """Have each piece of `size` bytes or more copied by copy_file_range."""
    monkeypatch.setattr(FLATTEN, "_LARGE", size)


# The right bytes, the right holes, the right numbers


@st.composite
def random_chains(draw: st.DrawFn) -> tuple[int, list[Extents]]:
    """A size, often no multiple of the page, and a base with 0 to 6 diffs."""
    size = draw(st.integers(1, 24 * PAGE) | st.integers(1, 24).map(lambda n: n * PAGE))
    count = -(-size // PAGE)
    chain = []
    for layer in range(1 + draw(st.integers(0, 6))):
        kinds = draw(st.lists(st.sampled_from("...dz"), min_size=count, max_size=count))
        extents = []
        for start, kind in zip(range(0, size, PAGE), kinds, strict=True):
            length = min(PAGE, size - start)
            if kind != ".":
                extents.append(
                    (start, signed(layer, start, length) if kind == "d" else bytes(length))
                )
        chain.append(extents)
    return size, chain


@settings(deadline=None, max_examples=150)
@given(
    random_chains(),
    st.sampled_from([PAGE, 3 * PAGE, FLATTEN._LARGE]),
    st.sampled_from([PAGE, 2 * PAGE, FLATTEN._BUFFER]),
)
def test_output_is_the_oracle(
    sized_chain: tuple[int, list[Extents]], large: int, buffer: int
) -> None:
    """Whatever is copied in the kernel, and wherever the buffers' borders lie."""
    size, chain = sized_chain
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        copy_in_kernel(patch, large)
        patch.setattr(FLATTEN, "_BUFFER", buffer)
        paths = write_chain(Path(directory), chain, size)
        out = Path(directory) / "out"
        with unchanged(paths), open_view(paths) as view:
            result = flatten(view, out, verify=True)
            visible, data = view.visible_bytes(), data_of_view(view)
        assert out.read_bytes() == overlay_oracle(size, chain)
        assert data_of(out) == data
        assert result.size == size == sum(visible) + result.holes
        assert [c + s for c, s in zip(result.copied, result.shared, strict=True)] == visible


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_named_errnos_copy_through_a_buffer(
    chain: MergedView, out: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    data = data_of_view(chain)
    copy_in_kernel(monkeypatch)
    no_kernel_copy(monkeypatch, number)
    flatten(chain, out)
    assert out.read_bytes() == ORACLE
    assert data_of(out) == data


def test_short_kernel_copies_are_continued(
    chain: MergedView, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_in_kernel(monkeypatch)
    whole = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", lambda a, b, n, *at: whole(a, b, min(n, 1000), *at))
    flatten(chain, out)
    assert out.read_bytes() == ORACLE


@pytest.mark.parametrize("large", [PAGE, 8 * PAGE, FLATTEN._LARGE])
def test_no_byte_is_read_that_does_not_show(
    chain: MergedView, out: Path, monkeypatch: pytest.MonkeyPatch, large: int
) -> None:
    """So a bad sector under a diff's page harms nobody. Only large pieces are the kernel's."""
    copy_in_kernel(monkeypatch, large)
    monkeypatch.setattr(FLATTEN, "_BUFFER", 4 * PAGE)
    numbers = {layer.fd: number for number, layer in enumerate(chain.layers)}
    read: list[tuple[int, int, int]] = []
    in_kernel: list[tuple[int, int, int]] = []
    preadv, copy_file_range = os.preadv, os.copy_file_range

    def reading(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        count = preadv(fd, buffers, offset, flags)
        read.append((offset, offset + count, numbers[fd]))
        return count

    def copying_in_kernel(source: int, target: int, length: int, at: int, to: int) -> int:
        count = copy_file_range(source, target, length, at, to)
        assert at == to
        in_kernel.append((at, at + count, numbers[source]))
        return count

    monkeypatch.setattr(os, "preadv", reading)
    monkeypatch.setattr(os, "copy_file_range", copying_in_kernel)
    monkeypatch.setattr(copying, "fcntl", FakeIoctl(errno.EOPNOTSUPP))
    flatten(chain, out)
    assert out.read_bytes() == ORACLE
    assert all(stop - start >= large for start, stop, _ in in_kernel)
    assert all(stop - start <= 4 * PAGE for start, stop, _ in read)
    # Joined, what was asked of the layers is the plan, each byte once.
    asked = sorted(read + in_kernel)
    joined = [asked[0]]
    for start, stop, number in asked[1:]:
        if (joined[-1][1], joined[-1][2]) == (start, number):
            joined[-1] = (joined[-1][0], stop, number)
        else:
            joined.append((start, stop, number))
    assert joined == [tuple(s) for s in chain.segments() if s.layer is not None]
    assert bool(in_kernel) == (large <= 8 * PAGE)


@pytest.mark.parametrize(
    "number", [errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.ETXTBSY]
)
def test_named_errnos_of_a_clone_lead_to_a_copy(
    chain: MergedView, out: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(copying, "fcntl", FakeIoctl(number))
    result = flatten(chain, out)
    assert out.read_bytes() == ORACLE
    assert (result.copied, result.reflinked) == (VISIBLE, False)


def test_a_layer_that_cannot_be_shared_is_tried_once(
    chain: MergedView, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the base once more, by a range: a call for each of its segments would be in vain."""
    module = FakeIoctl(errno.EOPNOTSUPP)
    monkeypatch.setattr(copying, "fcntl", module)
    flatten(chain, out)
    assert module.asked == [0x40049409, *[0x4020940D] * len(chain.layers)]


class FakeIoctl:
    """An fcntl module whose ioctl fails; `asked` are the operations."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.asked: list[int] = []

    def ioctl(self, fd: int, operation: int, argument: object) -> int:
        self.asked.append(operation)
        raise os_error(self.number)


class Sharing:
    """An fcntl module whose ioctl shares by copying, but not from the descriptors in `refused`."""

    def __init__(self, refused: set[int], number: int = errno.EXDEV) -> None:
        self.refused = refused
        self.number = number
        self.asked: list[int] = []

    def ioctl(self, fd: int, operation: int, argument: int | bytes) -> int:
        if isinstance(argument, bytes):
            source, start, length, to = struct.unpack("=qQQQ", argument)
            assert (operation, to) == (0x4020940D, start)
            ranges = [(start, start + length)]
        else:
            source = argument
            assert operation == 0x40049409
            ranges = list(sparse.data_extents(source, os.fstat(source).st_size))
        self.asked.append(source)
        if source in self.refused:
            raise os_error(self.number)
        for start, stop in ranges:
            os.pwrite(fd, os.pread(source, stop - start, start), start)
        return 0


@settings(deadline=None, max_examples=100)
@given(random_chains(), st.sets(st.integers(0, 6)), st.sampled_from([1, 2, 5, FLATTEN._BATCH]))
def test_layers_that_cannot_be_shared_are_copied_among_those_that_can(
    sized_chain: tuple[int, list[Extents]], refused: set[int], batch: int
) -> None:
    """Wherever in a batch one is met: each layer is shared whole, or copied whole."""
    size, chain = sized_chain
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        paths = write_chain(Path(directory), chain, size)
        out = Path(directory) / "out"
        with unchanged(paths), open_view(paths) as view:
            numbers = {layer.fd: number for number, layer in enumerate(view.layers)}
            module = Sharing({fd for fd, number in numbers.items() if number in refused})
            patch.setattr(FLATTEN, "_BATCH", batch)
            patch.setattr(copying, "fcntl", module)
            result = flatten(view, out)
            visible, segments = view.visible_bytes(), list(view.segments())
        assert out.read_bytes() == overlay_oracle(size, chain)
        asked = [numbers[fd] for fd in module.asked]
        for number, count in enumerate(visible):
            moved = (count, 0) if number in refused else (0, count)
            assert (result.copied[number], result.shared[number]) == moved
            # The base as a whole, and if that was refused, once more by a range.
            pieces = sum(segment.layer == number for segment in segments)
            once = min(pieces, 1) if number in refused or number == 0 else pieces
            assert asked.count(number) == once * (2 if number in refused and number == 0 else 1)


@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.EIO, FileAccessError), (errno.ENOSPC, NoSpaceError), (errno.EPERM, FileAccessError)],
)
def test_other_errors_of_a_clone_never_lead_to_a_copy(
    chain: MergedView,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    expected: type[DiffMergeError],
) -> None:
    monkeypatch.setattr(copying, "fcntl", FakeIoctl(number))
    with pytest.raises(expected, match=os.strerror(number)):
        flatten(chain, out)
    assert no_litter(out)


def test_an_error_of_a_clone_names_its_layer(
    chain: MergedView, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "fcntl", Sharing({chain.layers[2].fd}, errno.EIO))
    with pytest.raises(FileAccessError, match=re.escape(f"{chain.layers[2].path} -> {out}: ")):
        flatten(chain, out)
    assert no_litter(out)


@pytest.mark.parametrize("batch", [1, 3])
def test_layers_are_compared_after_each_batch_that_is_shared(
    chain: MergedView, out: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """Where a MiB of them was shared since the last time."""
    monkeypatch.setattr(FLATTEN, "_BATCH", batch)
    monkeypatch.setattr(FLATTEN, "BLOCK", PAGE)
    sharing = Sharing(set())
    monkeypatch.setattr(copying, "fcntl", sharing)
    events: list[str] = []
    check, ioctl = Layer.check_unchanged, sharing.ioctl
    monkeypatch.setattr(
        Layer, "check_unchanged", first(lambda layer: events.append(Path(layer.path).stem), check)
    )
    monkeypatch.setattr(sharing, "ioctl", first(lambda *_: events.append("share"), ioctl))
    flatten(chain, out)
    pieces = [f"{s.layer:03}" for s in chain.segments() if s.layer]
    assert events[:2] == ["share", "000"]
    expected = []
    for n in range(0, len(pieces), batch):
        part = pieces[n : n + batch]
        expected += ["share"] * len(part) + list(dict.fromkeys(part))
    assert events[2:] == [*expected, "000", "001", "002"]


def test_progress_adds_up_to_the_bytes_of_data(chain: MergedView, out: Path) -> None:
    seen: list[int] = []
    flatten(chain, out, progress=seen.append)
    assert all(seen)
    assert sum(seen) == sum(chain.visible_bytes())


# What may stand under the name, and when


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
def test_takes_the_mode_of_the_base_at_the_end(
    chain: MergedView, out: Path, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    modes: list[int] = []
    fchmod = os.fchmod

    def seen(fd: int, mode: int) -> None:
        modes.append(stat.S_IMODE(os.fstat(fd).st_mode))
        assert no_litter(out)
        fchmod(fd, mode)

    monkeypatch.setattr(os, "fchmod", seen)
    for layer in chain.layers:
        os.chmod(layer.path, 0o644)
    with open_view([Path(layer.path) for layer in chain.layers]) as view:
        before = os.umask(umask)
        try:
            flatten(view, out)
        finally:
            os.umask(before)
    assert modes == [0o600]
    assert stat.S_IMODE(out.stat().st_mode) == 0o644


def test_nobody_reads_what_a_layer_withholds(tmp_path: Path, out: Path) -> None:
    paths = write_chain(tmp_path)
    for path, mode in zip(paths, (0o664, 0o640, 0o600), strict=True):
        path.chmod(mode)
    with open_view(paths) as view:
        flatten(view, out)
    assert stat.S_IMODE(out.stat().st_mode) == 0o620


def test_an_existing_output_is_refused(chain: MergedView, out: Path) -> None:
    out.write_bytes(b"precious")
    with pytest.raises(OutputRefusedError, match=r"whole\.mem: exists; .*--force"):
        flatten(chain, out)
    assert out.read_bytes() == b"precious"


def test_an_output_that_appears_meanwhile_is_refused(chain: MergedView, out: Path) -> None:
    def appear(_: int) -> None:
        out.write_bytes(b"precious")

    with pytest.raises(OutputRefusedError, match="exists"):
        flatten(chain, out, progress=appear)
    assert out.read_bytes() == b"precious"
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("named", [False, True])
def test_force_replaces_in_one_step(
    chain: MergedView, out: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    if named:
        without_tmpfile(monkeypatch)
    out.write_bytes(b"old")

    def is_old(done: int) -> None:
        assert out.read_bytes() == b"old"

    with out.open("rb") as reader:
        flatten(chain, out, force=True, progress=is_old)
        assert reader.read() == b"old"
    assert out.read_bytes() == ORACLE
    assert list(out.parent.iterdir()) == [out]


def test_force_where_nothing_stands(chain: MergedView, out: Path) -> None:
    flatten(chain, out, force=True)
    assert out.read_bytes() == ORACLE
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("linked", [False, True])
def test_a_layer_is_no_output(chain: MergedView, out: Path, layer: int, linked: bool) -> None:
    path = Path(chain.layers[layer].path)
    if linked:
        os.link(path, out)
        path = out
    with pytest.raises(OutputRefusedError, match="is a layer of the image itself"):
        flatten(chain, path, force=True)


def test_a_layer_that_comes_to_stand_there_is_no_output(chain: MergedView, out: Path) -> None:
    def link(done: int) -> None:
        if not out.exists():
            os.link(chain.layers[0].path, out)

    with pytest.raises(OutputRefusedError, match="is a layer of the image itself"):
        flatten(chain, out, force=True, progress=link)
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("kind", ["directory", "fifo", "symlink", "dangling", "socket"])
@pytest.mark.parametrize("force", [False, True])
def test_only_a_regular_file_can_be_replaced(
    chain: MergedView, out: Path, kind: str, force: bool
) -> None:
    target = out.parent / "target"
    if kind == "directory":
        out.mkdir()
    elif kind == "fifo":
        os.mkfifo(out)
    elif kind == "socket":
        os.mknod(out, 0o600 | stat.S_IFSOCK)
    else:
        if kind == "symlink":
            target.write_bytes(b"precious")
        out.symlink_to(target)
    before = sorted(out.parent.iterdir())
    with pytest.raises(OutputRefusedError, match=r"whole\.mem: exists and is no regular file"):
        flatten(chain, out, force=force)
    assert sorted(out.parent.iterdir()) == before
    if kind == "symlink":
        assert target.read_bytes() == b"precious"


def test_a_device_is_refused(chain: MergedView) -> None:
    with pytest.raises(OutputRefusedError, match="no regular file"):
        flatten(chain, "/dev/null", force=True)


@pytest.mark.parametrize("name", ["out/", "out/.", ".."])
def test_a_name_of_a_directory_is_refused(chain: MergedView, out: Path, name: str) -> None:
    with pytest.raises(OutputRefusedError, match="is a directory"):
        flatten(chain, f"{out.parent.parent}/{name}", force=True)
    assert no_litter(out)


def test_a_missing_directory_is_one_line(chain: MergedView, out: Path) -> None:
    with pytest.raises(FileAccessError, match=r"missing/whole\.mem: No such file or directory: "):
        flatten(chain, out.parent / "missing" / out.name)
    assert no_litter(out)


def test_a_name_without_directory_is_in_the_working_one(
    chain: MergedView, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(out.parent)
    flatten(chain, out.name)
    assert out.read_bytes() == ORACLE


def without_tmpfile(monkeypatch: pytest.MonkeyPatch, number: int = errno.EOPNOTSUPP) -> None:
    opened = os.open

    def refusing(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise os_error(number)
        return opened(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refusing)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL])
def test_a_named_temporary_where_there_is_no_tmpfile(
    chain: MergedView, out: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    without_tmpfile(monkeypatch, number)
    seen: list[tuple[str, int]] = []

    def look(done: int) -> None:
        seen.extend((p.name, stat.S_IMODE(p.stat().st_mode)) for p in out.parent.iterdir())

    flatten(chain, out, progress=look)
    assert all(n.startswith(".diffmergefs-") and n.endswith(".tmp") for n, _ in seen)
    assert {mode for _, mode in seen} == {0o600}
    assert out.read_bytes() == ORACLE
    assert list(out.parent.iterdir()) == [out]


def test_without_tmpfile_for_another_reason_is_an_error(
    chain: MergedView, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_tmpfile(monkeypatch, errno.EACCES)
    with pytest.raises(FileAccessError, match=r"whole\.mem: Permission denied"):
        flatten(chain, out)
    assert no_litter(out)


def test_durable_order(chain: MergedView, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, link = os.fsync, os.link

    def fsynced(fd: int) -> None:
        done.append("directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    def linked(*args: Any, **kwargs: Any) -> None:
        done.append("link")
        link(*args, **kwargs)

    monkeypatch.setattr(os, "fsync", fsynced)
    monkeypatch.setattr(os, "link", linked)
    flatten(chain, out)
    assert done == ["file", "link", "directory"]


# Nothing half-written


FAILURES = [
    (os_error(errno.EIO), FileAccessError),
    (os_error(errno.ENOSPC), NoSpaceError),
    (os_error(errno.EDQUOT), NoSpaceError),
    (KeyboardInterrupt(), KeyboardInterrupt),
    (SystemExit(143), SystemExit),
]


@pytest.mark.parametrize(("error", "expected"), FAILURES, ids=lambda value: repr(value)[:40])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("call", "nth"),
    [
        ("copy_file_range", 1),
        ("copy_file_range", 3),
        ("preadv", 1),
        ("preadv", 3),
        ("pwrite", 1),
        ("pwrite", 2),
        ("ftruncate", 1),
        ("fchmod", 1),
        ("fsync", 1),
        ("link", 1),
        ("replace", 1),
    ],
)
def test_a_failure_leaves_nothing(
    chain: MergedView,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    expected: type[BaseException],
    named: bool,
    force: bool,
    call: str,
    nth: int,
) -> None:
    if named:
        without_tmpfile(monkeypatch)
    if call == "copy_file_range":
        copy_in_kernel(monkeypatch)
    if call == "preadv" and expected is NoSpaceError:
        expected = FileAccessError  # whatever the number, it is the layer's
    never = {"replace": not force, "link": named and force}
    fail_at(monkeypatch, call, nth, error)
    open_before = len(os.listdir("/proc/self/fd"))
    if never.get(call):
        flatten(chain, out, force=force)
        return
    with pytest.raises(expected):
        flatten(chain, out, force=force)
    assert no_litter(out)
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_an_interrupt_right_after_the_temporary_was_linked(
    chain: MergedView, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out.write_bytes(b"old")
    link = os.link

    def interrupted(*args: Any, **kwargs: Any) -> None:
        link(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", interrupted)
    with pytest.raises(KeyboardInterrupt):
        flatten(chain, out, force=True)
    assert out.read_bytes() == b"old"
    assert list(out.parent.iterdir()) == [out]


def test_a_temporary_that_cannot_be_removed_is_named_in_the_log(
    chain: MergedView,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    without_tmpfile(monkeypatch)
    fail_at(monkeypatch, "pwrite", 1, os_error(errno.EIO))
    fail_at(monkeypatch, "unlink", 1, os_error(errno.EROFS))
    with pytest.raises(FileAccessError, match=os.strerror(errno.EIO)):
        flatten(chain, out)
    (left,) = out.parent.iterdir()
    assert f"{left}: left behind: {os.strerror(errno.EROFS)}" in caplog.text


def test_a_failing_fsync_of_the_directory_leaves_the_whole_file(
    chain: MergedView, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, "fsync", 2, os_error(errno.EIO))
    with pytest.raises(FileAccessError, match=os.strerror(errno.EIO)):
        flatten(chain, out)
    assert out.read_bytes() == ORACLE


def test_a_read_error_names_the_layer_and_is_no_reason_to_copy_otherwise(
    chain: MergedView, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_in_kernel(monkeypatch)
    fail_at(monkeypatch, "copy_file_range", 1, os_error(errno.EIO))
    fail_at(monkeypatch, "pwrite", 1, AssertionError("a fallback"))
    with pytest.raises(FileAccessError, match=r"000\.mem -> .*whole\.mem: Input/output error$"):
        flatten(chain, out)
    assert no_litter(out)


def test_a_read_error_in_the_buffer_names_the_layer(
    chain: MergedView, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, "preadv", 1, os_error(errno.EIO))
    with pytest.raises(FileAccessError, match=r"000\.mem: Input/output error$"):
        flatten(chain, out)
    assert no_litter(out)


@pytest.mark.parametrize("spare", [-1, 0])
def test_asks_for_space_for_what_is_copied(
    chain: MergedView, out: Path, monkeypatch: pytest.MonkeyPatch, spare: int
) -> None:
    needed = sum(VISIBLE)
    blocks = needed // 512 + spare
    monkeypatch.setattr(os, "fstatvfs", lambda fd: Space(10**6, blocks, 512))
    monkeypatch.setattr(copying, "fcntl", FakeIoctl(errno.EOPNOTSUPP))
    if spare == 0:
        flatten(chain, out)
        return
    with pytest.raises(NoSpaceError) as caught:
        flatten(chain, out)
    assert f"{out}: {needed} bytes must be written, but {needed - 512} are free" in str(
        caught.value
    )
    assert no_litter(out)


def test_a_filesystem_without_limit_has_space(
    chain: MergedView, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fstatvfs", lambda fd: Space(0, 0, PAGE))
    flatten(chain, out)
    assert out.read_bytes() == ORACLE


KILLED = """
import sys, time
from diffmergefs import MergedView, Layer, flatten
view = MergedView([Layer.open(path) for path in sys.argv[2:]])
def wait(done):
    print(done, flush=True)
    time.sleep(60)
flatten(view, sys.argv[1], progress=wait)
"""


def test_a_kill_leaves_nothing(chain: MergedView, out: Path) -> None:
    layers = [layer.path for layer in chain.layers]
    command = [sys.executable, "-c", KILLED, str(out), *layers]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert int(process.stdout.readline()) > 0
        process.send_signal(signal.SIGKILL)
    assert no_litter(out)


# Layers that change (law 6)


@pytest.mark.parametrize("how", ["truncate", "write"])
@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("in_kernel", [True, False])
def test_a_layer_that_changes_half_way(
    tmp_path: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    layer: int,
    in_kernel: bool,
) -> None:
    if in_kernel:
        copy_in_kernel(monkeypatch)
    monkeypatch.setattr(FLATTEN, "BLOCK", PAGE)
    paths = write_chain(tmp_path)
    with open_view(paths) as view, pytest.raises(LayerChangedError, match=paths[layer].name):
        flatten(view, out, progress=lambda done: change(str(paths[layer]), how))
    assert no_litter(out)


@pytest.mark.parametrize("in_kernel", [True, False])
def test_a_layer_is_compared_after_each_piece(
    chain: MergedView, out: Path, monkeypatch: pytest.MonkeyPatch, in_kernel: bool
) -> None:
    """And all of them once more after the file was synced and before it is linked."""
    events: list[str] = []
    check, link, fsync = Layer.check_unchanged, os.link, os.fsync
    monkeypatch.setattr(
        Layer, "check_unchanged", first(lambda layer: events.append(Path(layer.path).stem), check)
    )
    monkeypatch.setattr(os, "link", first(lambda *_, **__: events.append("link"), link))
    monkeypatch.setattr(os, "fsync", first(lambda _: events.append("fsync"), fsync))
    monkeypatch.setattr(copying, "fcntl", FakeIoctl(errno.EOPNOTSUPP))
    if in_kernel:
        copy_in_kernel(monkeypatch)
        monkeypatch.setattr(FLATTEN, "BLOCK", PAGE)
        expected = [f"{s.layer:03}" for s in chain.segments() if s.layer is not None]
    else:
        # Each buffer: the layers in it. At the end, before it is told: those since the last MiB.
        expected = ["000", "001", "002", "002", "000", "001", "002"]
    flatten(chain, out)
    assert events == [*expected, "fsync", "000", "001", "002", "link", "fsync"]


def test_what_is_no_change_does_not_fail(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_chain(tmp_path)
    with open_view(paths) as view:
        flatten(view, out, progress=lambda done: paths[1].chmod(0o640))
    assert out.read_bytes() == ORACLE


# --verify


@pytest.mark.parametrize("offset", [2 * PAGE + 17, 50 * PAGE, SIZE - 1])
def test_verify_finds_the_first_wrong_byte(
    chain: MergedView, out: Path, monkeypatch: pytest.MonkeyPatch, offset: int
) -> None:
    fsync = os.fsync

    def corrupting(fd: int) -> None:
        for position in {offset, SIZE - 1}:
            old = os.pread(fd, 1, position)
            os.pwrite(fd, bytes([old[0] ^ 1]), position)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", corrupting)
    with pytest.raises(VerificationError, match=f"byte {offset} of {SIZE} does not read back"):
        flatten(chain, out, verify=True)
    assert no_litter(out)


@pytest.mark.parametrize("size", [3 * PAGE, 50 * PAGE])
def test_verify_finds_a_file_that_is_too_short(
    chain: MergedView, out: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Also when only bytes of a hole are missing."""
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", first(lambda fd: os.ftruncate(fd, size), fsync))
    with pytest.raises(VerificationError, match=f"byte {size} of {SIZE}"):
        flatten(chain, out, verify=True)
    assert no_litter(out)


def test_verify_compares_beyond_the_first_block(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 3 * BLOCK + 5
    wrong = 2 * BLOCK + 7
    base = write_layer(tmp_path / "base", size, [(0, signed(0, 0, size))])
    with open_view([base]) as view:
        flatten(view, out, verify=True)
        assert out.read_bytes() == signed(0, 0, size)
        out.unlink()
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda fd: (os.pwrite(fd, b"!", wrong), fsync(fd))[1])
        with pytest.raises(VerificationError, match=f"byte {wrong} of {size}.*{base}"):
            flatten(view, out, verify=True)


def test_without_verify_nothing_is_read_again(
    chain: MergedView, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def synced(fd: int) -> None:
        fsync(fd)
        fail_at(monkeypatch, "preadv", 1, AssertionError("read"))

    monkeypatch.setattr(os, "fsync", synced)
    flatten(chain, out)


def test_the_plan_is_the_view(chain: MergedView) -> None:
    """CHAIN is what the tests above take it for."""
    assert tuple(chain.visible_bytes()) == VISIBLE
    assert [s.layer for s in chain.segments()] == [0, 1, 0, 1, 0, 2, 0, None, 2, None]
