"""Copying a diff onto a base in place, and what depends on the base."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmergefs import apply_diff, seal_layer
from diffmergefs.core.errors import (
    DenseDiffError,
    FileAccessError,
    LayerChangedError,
    NoSpaceError,
    OutputRefusedError,
    SizeMismatchError,
    UntrustedExtentsError,
)
from diffmergefs.core.sparse import BLOCK, page_aligned
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.writing import copying
from diffmergefs.writing.apply import REASONS
from tests.support import stores
from tests.support.cloudhypervisor import write_snapshot
from tests.support.commands import diffmergefs, mistake
from tests.support.images import PAGE, another_name, overlay_oracle, signed, write_layer
from tests.support.inputs import unchanged
from tests.support.stores import write_chain, write_document, write_numbered
from tests.support.subjects.apply import (
    MERGED,
    SIZE,
    Extents,
    base_at,
    diff,
    pages,
    pair,
    reasons,
    refusal,
)
from tests.support.superserve import write_sandbox, write_template

__all__ = ["diff"]


def refuse(number: int) -> Callable[..., int]:
    def refusing(*args: Any) -> int:
        raise OSError(number, os.strerror(number))

    return refusing


# The contract of forkd's apply_diff


def test_copies_only_data_regions(tmp_path: Path) -> None:
    b = b"\xbb" * PAGE
    diff, base = pair(tmp_path, [(0, b"\xaa" * 4 * PAGE)], [(PAGE, b), (3 * PAGE, b)], 4 * PAGE)
    with unchanged([diff]):
        assert apply_diff(diff, base) == 2 * PAGE
    assert base.read_bytes() == (b"\xaa" * PAGE + b) * 2


def test_an_empty_diff_copies_nothing(tmp_path: Path) -> None:
    diff, base = pair(tmp_path, [(0, b"\xaa" * 2 * PAGE)], [], 2 * PAGE)
    with unchanged([diff, base]):
        assert apply_diff(diff, base) == 0


@pytest.mark.parametrize(("diff_pages", "base_pages"), [(4, 2), (2, 4)])
def test_another_size_is_refused(tmp_path: Path, diff_pages: int, base_pages: int) -> None:
    diff = write_layer(tmp_path / "diff", diff_pages * PAGE, pages(1, 0))
    base = write_layer(tmp_path / "base", base_pages * PAGE, pages(0, 0))
    numbers = f"diff: {diff_pages * PAGE} bytes, but .*base has {base_pages * PAGE};"
    with unchanged([diff, base]), pytest.raises(SizeMismatchError, match=numbers):
        apply_diff(diff, base)


# Firecracker's rebase-snap: its cases


@pytest.mark.parametrize(
    ("diff", "expected"),
    [
        pytest.param(pages(1, 0, 1), pages(1, 0, 1), id="data in both"),
        pytest.param(pages(1, 1), [*pages(0, 0), *pages(1, 1)], id="a hole in the diff"),
        pytest.param([(0, bytes(PAGE))], [(0, bytes(PAGE)), *pages(0, 1)], id="zeros in the diff"),
        pytest.param(pages(1, 2), [*pages(0, 0, 1), *pages(1, 2)], id="a hole in the base"),
    ],
)
def test_truth_table(tmp_path: Path, diff: Extents, expected: Extents) -> None:
    diff_path, base = pair(tmp_path, pages(0, 0, 1), diff)
    assert apply_diff(diff_path, base, force={"order"}) == sum(len(data) for _, data in diff)
    assert base.read_bytes() == overlay_oracle(SIZE, [expected])


# The right bytes


@pytest.mark.slow
@settings(deadline=None, max_examples=50)
@given(data=st.data(), size=st.integers(PAGE + 1, 12 * PAGE))
def test_base_becomes_the_oracle(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, size: int
) -> None:
    directory = tmp_path_factory.mktemp("apply")
    starts = range(0, size, PAGE)
    layers: list[Extents] = []
    for layer in range(2):
        chosen = data.draw(st.lists(st.sampled_from(starts), unique=True, max_size=len(starts) - 1))
        zeros = data.draw(st.sets(st.sampled_from(starts)))
        lengths = {start: min(PAGE, size - start) for start in chosen}
        layers.append(
            [(s, bytes(n) if s in zeros else signed(layer, s, n)) for s, n in lengths.items()]
        )
    diff, base = pair(directory, layers[0], layers[1], size)
    for _ in range(2):
        assert apply_diff(diff, base, force={"order"}) == sum(len(d) for _, d in layers[1])
        assert base.read_bytes() == overlay_oracle(size, layers)


def test_a_base_behind_a_symlink(tmp_path: Path) -> None:
    diff, base = pair(tmp_path, pages(0, 0), pages(1, 1))
    (tmp_path / "link").symlink_to(base)
    apply_diff(str(diff), str(tmp_path / "link"))
    assert base.read_bytes() == overlay_oracle(SIZE, [pages(0, 0), pages(1, 1)])


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.parametrize(
    ("length", "buffers"),
    [(3 * PAGE, [3 * PAGE]), (2 * BLOCK + PAGE, [BLOCK])],
)
def test_the_buffer_is_capped(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    length: int,
    buffers: list[int],
) -> None:
    """By 1 MiB, and by the data, whichever is less."""
    size = 4 * BLOCK
    content = signed(1, PAGE, length)
    diff, base = pair(tmp_path, [], [(PAGE, content)], size)
    made: list[int] = []

    def counted(count: int) -> memoryview:
        made.append(count)
        return page_aligned(count)

    monkeypatch.setattr(os, "copy_file_range", refuse(number))
    monkeypatch.setattr(copying, "page_aligned", counted)
    assert apply_diff(diff, base) == length
    assert made == buffers
    assert base.read_bytes() == overlay_oracle(size, [[(PAGE, content)]])


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diff, base = pair(tmp_path, [], pages(1, 1, 2))
    monkeypatch.setattr(os, "copy_file_range", refuse(errno.EXDEV))
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:999], at))
    assert apply_diff(diff, base) == 2 * PAGE
    assert base.read_bytes() == overlay_oracle(SIZE, [pages(1, 1, 2)])


def test_progress_is_the_bytes_of_each_step(tmp_path: Path) -> None:
    diff, base = pair(tmp_path, [], pages(1, 1, 3, 7))
    seen: list[int] = []
    apply_diff(diff, base, progress=seen.append)
    assert seen == [PAGE, PAGE, PAGE]


# What is done to the files, and what is not


def test_the_base_is_not_extended_or_truncated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 3 * PAGE + 123
    diff, base = pair(tmp_path, [], [(3 * PAGE, signed(1, 3 * PAGE, 123))], size)
    for name in ("ftruncate", "truncate"):
        monkeypatch.setattr(os, name, refuse(errno.EPERM))
    assert apply_diff(diff, base) == 123
    assert base.stat().st_size == size


@pytest.mark.parametrize("sync", [False, True])
def test_fsync_of_the_base_only_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: bool
) -> None:
    diff, base = pair(tmp_path, [], pages(1, 1))
    synced: list[int] = []
    fsync = os.fsync

    def counted(fd: int) -> None:
        synced.append(os.fstat(fd).st_ino)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", counted)
    apply_diff(diff, base, sync=sync)
    assert (base.stat().st_ino in synced) == sync


def test_opens_the_diff_for_reading_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diff, base = pair(tmp_path, pages(0, 0), pages(1, 1))
    opened: set[tuple[str, int]] = set()
    real_open = os.open

    def noted(*args: Any, **kwargs: Any) -> int:
        fd = real_open(*args, **kwargs)
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        opened.add((os.readlink(f"/proc/self/fd/{fd}"), mode))
        return fd

    monkeypatch.setattr(os, "open", noted)
    apply_diff(diff, base)
    assert (str(base), os.O_RDWR) in opened
    assert {mode for path, mode in opened if path == str(diff)} == {os.O_RDONLY}


def test_descriptors_are_closed(tmp_path: Path) -> None:
    diff, base = pair(tmp_path, [], pages(1, 1))
    before = os.listdir("/proc/self/fd")
    apply_diff(diff, base)
    with pytest.raises(OutputRefusedError):
        apply_diff(diff, diff)
    assert os.listdir("/proc/self/fd") == before


# Refusals leave the base as it was


@pytest.mark.parametrize("how", ["same", "hard link", "symlink"])
def test_one_file_for_both_is_refused(tmp_path: Path, how: str) -> None:
    diff, _ = pair(tmp_path, [], pages(1, 1))
    other = another_name(diff, how, tmp_path / "other")
    with unchanged([diff]), pytest.raises(OutputRefusedError, match="same file as the diff"):
        apply_diff(diff, other)


def test_a_dense_diff_is_refused(tmp_path: Path) -> None:
    diff, base = pair(tmp_path, pages(0, 0), [(0, signed(1, 0, SIZE))])
    with unchanged([diff, base]), pytest.raises(DenseDiffError, match=f"{SIZE} bytes.*--dense"):
        apply_diff(diff, base)
    with unchanged([diff, base]), pytest.raises(OutputRefusedError, match="two swapped"):
        apply_diff(diff, base, policy=TrustPolicy(dense=True))
    assert apply_diff(diff, base, policy=TrustPolicy(dense=True), force={"order"}) == SIZE
    assert base.read_bytes() == signed(1, 0, SIZE)


def test_an_untrusted_diff_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And what a policy overrides is a warning."""
    diff, base = pair(tmp_path, pages(0, 0), pages(1, 1))
    with unchanged([diff, base]), pytest.raises(UntrustedExtentsError, match="--trust-grain"):
        apply_diff(diff, base, policy=TrustPolicy(page_size=2 * PAGE))
    assert not caplog.records
    policy = TrustPolicy(page_size=2 * PAGE, trust_grain={"all"})
    assert apply_diff(diff, base, policy=policy) == PAGE
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"--trust-grain overrides the check of alignment: {diff}: ")


@pytest.mark.parametrize("which", ["diff", "base"])
def test_a_missing_file(tmp_path: Path, which: str) -> None:
    files = dict(zip(("diff", "base"), pair(tmp_path, pages(0, 0), pages(1, 1)), strict=True))
    files[which].unlink()
    with pytest.raises(FileAccessError, match=f"{files[which]}: No such file or directory$"):
        apply_diff(files["diff"], files["base"])
    assert not files[which].exists()


@pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFDIR])
def test_a_base_that_is_no_regular_file(tmp_path: Path, kind: int) -> None:
    diff, base = pair(tmp_path, [], pages(1, 1))
    base.unlink()
    if kind == stat.S_IFDIR:
        base.mkdir()
    else:
        os.mknod(base, 0o600 | kind)
    with pytest.raises(FileAccessError, match=r"base\.mem: .*not a regular file"):
        apply_diff(diff, base)


# Failures half-way


@pytest.mark.parametrize(
    ("number", "expected"), [(errno.EIO, FileAccessError), (errno.ENOSPC, NoSpaceError)]
)
def test_a_failed_copy_is_not_tried_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[Exception]
) -> None:
    diff, base = pair(tmp_path, [], pages(1, 1))
    monkeypatch.setattr(os, "copy_file_range", refuse(number))
    with unchanged([diff, base]), pytest.raises(expected, match=os.strerror(number)):
        apply_diff(diff, base)


@pytest.mark.parametrize("after", [1, 2, 3])
def test_can_be_repeated_after_an_interruption(tmp_path: Path, after: int) -> None:
    lower, upper = pages(0, *range(8)), [*pages(1, 1, 3), (5 * PAGE, bytes(PAGE))]
    diff, base = pair(tmp_path, lower, upper)

    done: list[int] = []

    def interrupt(count: int) -> None:
        done.append(count)
        if sum(done) == after * PAGE:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply_diff(diff, base, progress=interrupt)
    assert apply_diff(diff, base) == 3 * PAGE
    assert base.read_bytes() == overlay_oracle(SIZE, [lower, upper])


@pytest.mark.parametrize("in_kernel", [True, False])
@pytest.mark.parametrize("how", ["truncate", "write"])
def test_a_diff_that_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_kernel: bool, how: str
) -> None:
    diff, base = pair(tmp_path, [], pages(1, 1, 3))
    if not in_kernel:
        monkeypatch.setattr(os, "copy_file_range", refuse(errno.EXDEV))

    def change(done: int) -> None:
        if how == "truncate":
            os.truncate(diff, 2 * PAGE)
        else:
            os.utime(diff)

    with pytest.raises(LayerChangedError, match=r"diff\.mem"):
        apply_diff(diff, base, progress=change)
    assert base.stat().st_size == SIZE


# Sealed


@pytest.mark.parametrize("suffix", [".bmap", ".presence"])
@pytest.mark.parametrize("place", ["whole.mem", "link"])
def test_a_seal_or_a_presence_file(diff: Path, public_path: Path, suffix: str, place: str) -> None:
    base, link = base_at(public_path / "whole.mem"), public_path / "link"
    link.symlink_to(base)
    record = public_path / f"{place}{suffix}"
    record.write_text("of old")
    assert f"{record}, which would be false (sealed)" in refusal(diff, link)
    assert record.exists()
    apply_diff(diff, link, force=["sealed"])
    assert not record.exists() and base.read_bytes() == MERGED


def test_swapped_files_leave_the_diff_and_its_seal(diff: Path, public_path: Path) -> None:
    whole = base_at(public_path / "whole.mem")
    seal = Path(seal_layer(diff).path)
    text = refusal(whole, diff)
    assert text.startswith(f"{diff}: not overwritten: ")
    assert f"{whole} covers {PAGE} of its {PAGE} bytes of data: are the two swapped?" in text
    assert text.endswith("--force=sealed,order")
    assert seal.exists()


# A layer of a store


def forkd(root: Path) -> Path:
    return write_chain(root, ["base", "work"]) / "base" / "memory.bin"


def forkd_without_a_document(root: Path) -> Path:
    (forkd(root).parent / "snapshot.json").unlink()
    return root / "base" / "memory.bin"


def forkd_beside_its_tags(root: Path) -> Path:
    memory = root / "base.mem"
    return recorded_elsewhere(root, memory)


def forkd_a_level_deeper(root: Path) -> Path:
    (root / "images").mkdir(parents=True)
    return recorded_elsewhere(root, root / "images" / "base.mem")


def recorded_elsewhere(root: Path, memory: Path) -> Path:
    forkd(root).rename(memory)
    write_document(root, "base", json.dumps({"memory": str(memory)}))
    return memory


def numbered(root: Path) -> Path:
    return write_numbered(root, ["000-base.mem", "001-work.mem"]) / "000-base.mem"


def numbered_with_a_suffix(root: Path) -> Path:
    return write_numbered(root, ["000-base.raw", "001-work.raw"]) / "000-base.raw"


def numbered_with_a_gap(root: Path) -> Path:
    return write_numbered(root, ["000-base.mem", "007-work.mem"]) / "007-work.mem"


def both_layouts(root: Path) -> Path:
    forkd(root)
    return numbered(root)


def superserve(root: Path) -> Path:
    memory = write_template(root)
    write_sandbox(root, "box", memory)
    return memory


def cloud_hypervisor(root: Path) -> Path:
    write_snapshot(root, "base")
    write_snapshot(root, "work", "base", layer=1)
    return root / "base" / "memory-ranges"


STORES = [
    forkd,
    forkd_without_a_document,
    forkd_beside_its_tags,
    forkd_a_level_deeper,
    numbered,
    numbered_with_a_suffix,
    numbered_with_a_gap,
    both_layouts,
    superserve,
]


@pytest.mark.parametrize("make", [*STORES, cloud_hypervisor])
def test_a_layer_of_a_store_and_a_copy_beside_it(
    diff: Path, public_path: Path, make: Callable[[Path], Path]
) -> None:
    layer = make(public_path / "store")
    if make is cloud_hypervisor:
        write_snapshot(public_path / "other", "parent")
        write_snapshot(public_path / "other", "new", "parent", layer=9, numbers=[9])
        diff = public_path / "other" / "new" / "memory-ranges"
    (public_path / "link").symlink_to(layer)
    for path in (layer, public_path / "link"):
        assert "layer" in reasons(diff, path)
    if make is not cloud_hypervisor:  # whose files have one name only
        copy = base_at(layer.parent / "copy.mem")
        assert reasons(diff, copy) == []


def test_the_tag_and_the_store_are_named(diff: Path, public_path: Path) -> None:
    store = public_path / "store"
    text = refusal(diff, forkd(store))
    assert f"it is the layer of 'base' in {store} (layer)" in text


# Links, and who has it open


def test_further_names(diff: Path, public_path: Path) -> None:
    base = base_at(public_path / "whole.mem")
    os.link(base, public_path / "other")
    assert "it has 2 names (hard links)" in refusal(diff, base)
    assert reasons(diff, base) == ["links"]


# A layer of what is mounted


# The other way round


@pytest.mark.parametrize(
    ("numbers", "covered", "expected"),
    [
        (range(10), range(10), ["order"]),
        (range(10), range(9), ["order"]),
        (range(10), range(8), []),
        (range(10), [*range(8), *range(10, 16)], []),
        ([], range(8), []),
    ],
)
def test_a_diff_that_covers_the_base(
    tmp_path: Path, numbers: list[int], covered: list[int], expected: list[str]
) -> None:
    base = write_layer(tmp_path / "base", stores.SIZE, stores.pages(0, numbers))
    diff = write_layer(tmp_path / "diff", stores.SIZE, stores.pages(1, covered))
    assert reasons(diff, base) == expected


# All at once, and --force


def test_an_override_that_is_not_needed_says_nothing(diff: Path, public_path: Path) -> None:
    base = base_at(public_path / "whole.mem")
    done = diffmergefs("apply", "--force=links,open", diff, base)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("names", ["", "all", "links,opened", "links, open"])
def test_a_name_that_is_none_is_bad_usage(diff: Path, public_path: Path, names: str) -> None:
    base = base_at(public_path / "whole.mem")
    with unchanged([base]):
        done = diffmergefs("apply", f"--force={names}", diff, base)
    assert done.returncode == 2 and ", ".join(REASONS) in done.stderr


def test_the_same_file_and_another_size_are_never_overridden(diff: Path, public_path: Path) -> None:
    longer = write_layer(public_path / "longer", stores.SIZE + PAGE, stores.pages(1, [1]))
    with unchanged([diff, longer]):
        assert "same file" in mistake(8, "apply", f"--force={','.join(REASONS)}", diff, diff)
        mistake(4, "apply", f"--force={','.join(REASONS)}", diff, longer)
