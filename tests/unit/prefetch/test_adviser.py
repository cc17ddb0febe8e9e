"""The child of --prefetch=fadvise: what it asks for, and of which file only."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffmergefs.core.errors import DiffMergeError, FileAccessError
from diffmergefs.core.extents import Extent
from diffmergefs.prefetch import adviser as module
from diffmergefs.prefetch.adviser import ANOTHER, Adviser, advise, packed
from diffmergefs.prefetch.push import Push
from tests.support.live import Gate, until
from tests.support.pagecache import evict, resident
from tests.support.restores import PAGES, SIZE, ranges_of, scattered, shown, write_pair

TOUCHED = scattered(30)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return write_pair(tmp_path)


@pytest.fixture
def push(files: tuple[Path, Path]) -> Push:
    # The base stands for the mounted file.
    return Push(shown(*files), files[0].stat().st_ino)


def adviser(files: tuple[Path, Path]) -> Adviser:
    return Adviser(files[0].stat().st_dev, lambda image: str(files[0]))


def opens(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *what: asked.append(what))
    assert advise(str(path), *identity(path), packed(ranges_of(TOUCHED))) == 0
    return asked


def identity(path: Path) -> tuple[int, int]:
    return path.stat().st_dev, path.stat().st_ino


def test_just_the_ranges_are_asked_for_in_order(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [(start, stop - start, os.POSIX_FADV_WILLNEED) for start, stop in ranges_of(TOUCHED)]
    assert opens(files[0], monkeypatch) == expected


@pytest.mark.parametrize("what", ["inode", "device"])
def test_another_file_at_the_path_is_left_alone(
    what: str, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fadvise", lambda *what: pytest.fail("asked"))
    device, inode = identity(files[0])
    other = (device + 1, inode) if what == "device" else (device, inode + 1)
    assert advise(str(files[0]), *other, packed(ranges_of(TOUCHED))) == ANOTHER


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    assert advise(str(tmp_path / "fifo"), 0, 0, b"") == ANOTHER
    with pytest.raises(OSError, match="symbolic links"):
        advise(str(tmp_path / "link"), 0, 0, b"")


def test_a_child_brings_them(files: tuple[Path, Path], push: Push) -> None:
    with files[0].open("rb") as file:
        evict(file.fileno())
        if resident(file.fileno()):
            pytest.fail("the filesystem does not drop pages")
        method = adviser(files)
        assert sum(method.populate(push, ranges_of(TOUCHED))) == len(TOUCHED) * 4096
        until(lambda: resident(file.fileno()) >= set(TOUCHED), "not all of it was read")
        assert len(resident(file.fileno())) < PAGES


def test_the_child_is_known_while_it_runs(files: tuple[Path, Path], push: Push) -> None:
    method = adviser(files)
    steps = method.populate(push, ranges_of(TOUCHED))
    assert not method.is_own(os.getpid())
    next(steps)
    (child,) = method._children
    assert method.is_own(child)
    for _ in steps:
        pass
    assert not method.is_own(child) and not Path(f"/proc/{child}").exists()


def test_a_child_that_is_not_wanted_any_more_is_ended(
    files: tuple[Path, Path], push: Push, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(tmp_path / "gate")
    program = tmp_path / "hangs.py"
    program.write_text(gate.code + "wait_at_gate()\n")
    monkeypatch.setattr(module, "__file__", str(program))
    method = adviser(files)
    steps = method.populate(push, [Extent(0, 4096)])
    assert next(steps) == 0
    (child,) = method._children
    gate.wait_until_reached()
    steps.close()
    assert not Path(f"/proc/{child}").exists() and not method._children
    gate.open()


def test_a_file_that_is_not_shown_any_more_is_a_reason(push: Push, tmp_path: Path) -> None:
    with pytest.raises(FileAccessError, match="the mount no longer has it"):
        list(Adviser(0, lambda image: None).populate(push, ranges_of(TOUCHED)))
    for path in (tmp_path / "gone", tmp_path / "base.mem"):
        with pytest.raises(DiffMergeError, match=r"is no longer there"):
            list(Adviser(0, lambda image, p=path: str(p)).populate(push, []))  # type: ignore[misc]


def test_many_ranges_fit_through_the_pipe(files: tuple[Path, Path], push: Push) -> None:
    many = [Extent(n % SIZE // 4096 * 4096, n % SIZE // 4096 * 4096 + 4096) for n in range(100_000)]
    assert sum(adviser(files).populate(push, many)) == 100_000 * 4096
