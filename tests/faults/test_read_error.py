"""EIO from a layer reaches just the reader of those bytes, and the daemon serves on."""

from __future__ import annotations

import errno
import mmap
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import faulty
from tests.support.commands import diffmergefs, mistake
from tests.support.faulty import Faulty
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.inputs import unchanged
from tests.support.live import held
from tests.support.mounts import mounted

NO_FILE = 14
PAGES = 1024
SIZE = PAGES * PAGE
BAD = [3, 64, 65, 66, 700, PAGES - 1]
#: Every fifth page is the diff's, some bad pages of the base among them.
CHAIN = [
    [(0, signed(0, 0, SIZE))],
    [(n * PAGE, signed(1, n * PAGE, PAGE)) for n in range(0, PAGES, 5)],
]
ORACLE = overlay_oracle(SIZE, CHAIN)
HIDDEN = [page for page in BAD if page % 5 == 0]
FAILING = [page for page in BAD if page % 5]
EXPECTED_LOG = ("read: [Errno 5]",)


@pytest.fixture
def base(public_path: Path) -> Iterator[Faulty]:
    """The base lies on a file system that can fail."""
    (public_path / "disk").mkdir()
    (public_path / "source").mkdir()
    path = write_layer(public_path / "source" / "base", SIZE, CHAIN[0])
    with unchanged([path]), faulty.mounted(public_path / "source", public_path / "disk") as disk:
        yield disk


@pytest.fixture
def diff(public_path: Path) -> Iterator[Path]:
    path = write_layer(public_path / "diff", SIZE, CHAIN[1])
    with unchanged([path]):
        yield path


def break_pages(disk: Faulty, pages: list[int]) -> None:
    disk.break_bytes("base", [(page * PAGE, (page + 1) * PAGE) for page in pages])


def failing_pages(path: Path) -> list[int]:
    """The pages of the view that cannot be read; all others must be right."""
    found = []
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for page in range(PAGES):
            try:
                content = os.pread(file.fileno(), PAGE, page * PAGE)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                found.append(page)
            else:
                assert content == ORACLE[page * PAGE :][:PAGE], f"page {page}"
    return found


def test_through_the_mount(base: Faulty, diff: Path, mountpoint: Path) -> None:
    """Each page by itself: the bad ones fail, all others are right, and once healed all are."""
    assert HIDDEN and FAILING
    layers = ["--base", str(base.path / "base"), "--diff", str(diff)]
    with mounted(None, mountpoint, *layers, expect_log=EXPECTED_LOG) as mount:
        view = mountpoint / "base"
        assert failing_pages(view) == []
        break_pages(base, BAD)
        assert failing_pages(view) == FAILING
        assert "read: [Errno 5]" in mount.log()
        assert failing_pages(view) == FAILING
        break_pages(base, [])
        assert failing_pages(view) == []
        assert mount.process.poll() is None
        assert view.read_bytes() == ORACLE


def test_a_large_read_ends_before_the_bad_page(base: Faulty, diff: Path, mountpoint: Path) -> None:
    layers = ["--base", str(base.path / "base"), "--diff", str(diff)]
    with mounted(None, mountpoint, *layers, expect_log=EXPECTED_LOG):
        break_pages(base, [FAILING[1]])
        with (mountpoint / "base").open("rb", buffering=0) as file:
            got = os.pread(file.fileno(), SIZE, 0)
            assert got == ORACLE[: FAILING[1] * PAGE]
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(file.fileno(), SIZE, FAILING[1] * PAGE)


def test_in_mappings(base: Faulty, diff: Path, mountpoint: Path) -> None:
    """Who touches a bad page gets SIGBUS; another process with the same mapping lives on."""
    layers = ["--base", str(base.path / "base"), "--diff", str(diff)]
    with mounted(None, mountpoint, *layers, expect_log=EXPECTED_LOG) as mount:
        view = mountpoint / "base"
        break_pages(base, BAD)
        with held(view) as victim, held(view) as other:
            for page in HIDDEN:
                assert victim.read(page * PAGE, PAGE) == signed(1, page * PAGE, PAGE)
            assert victim.read(FAILING[0] * PAGE, PAGE) == b""
            assert victim.process.wait(60) == -signal.SIGBUS
            for page in set(range(PAGES)) - set(FAILING):
                assert other.read(page * PAGE, PAGE) == ORACLE[page * PAGE :][:PAGE]
            break_pages(base, [])
            assert other.read(FAILING[0] * PAGE, PAGE) == ORACLE[FAILING[0] * PAGE :][:PAGE]
        assert mount.process.poll() is None
        with view.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as whole:
            assert whole[:] == ORACLE


@pytest.mark.parametrize("options", [(), ("--verify",)])
@pytest.mark.parametrize("old", [None, b"what stood there"])
def test_flatten_fails_whole(
    base: Faulty, diff: Path, public_path: Path, options: tuple[str, ...], old: bytes | None
) -> None:
    out = public_path / "out"
    out.mkdir()
    if old:
        (out / "image").write_bytes(old)
        options = (*options, "--force")
    arguments: list[str | Path] = [
        "flatten",
        "--base",
        base.path / "base",
        "--diff",
        diff,
        "-o",
        out / "image",
    ]
    # Opening reads nothing of a base without a seal: it fails half-way.
    break_pages(base, [FAILING[-1]])
    line = mistake(NO_FILE, *arguments, *options)
    assert f"{base.path / 'base'}" in line and "Input/output error" in line
    assert os.listdir(out) == (["image"] if old else [])
    assert not old or (out / "image").read_bytes() == old
    break_pages(base, [])
    assert diffmergefs(*arguments, *options).returncode == 0
    assert (out / "image").read_bytes() == ORACLE


def test_apply_of_a_diff_that_cannot_be_read(base: Faulty, public_path: Path) -> None:
    """A dense diff on the failing file system: one line, and it can be repeated."""
    target = write_layer(public_path / "target", SIZE, [])
    break_pages(base, [FAILING[-1]])
    vouched = "--dense", "--trust-grain=filesystem"
    done = diffmergefs("apply", *vouched, base.path / "base", target)
    line = done.stderr.splitlines()[-1]
    assert (done.returncode, done.stdout) == (NO_FILE, "")
    assert f"{base.path / 'base'}" in line and "Input/output error" in line
    assert target.stat().st_size == SIZE
    break_pages(base, [])
    # All that the target has by now is the diff's.
    again = "apply", *vouched, "--force=order", base.path / "base", target
    assert diffmergefs(*again).returncode == 0
    assert target.read_bytes() == signed(0, 0, SIZE)
