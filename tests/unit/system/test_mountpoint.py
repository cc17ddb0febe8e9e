"""Where diffmergefs mounts, and where it refuses to."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs.core.errors import MountpointError
from diffmergefs.system.mountpoint import check_mountpoint, mount_entry, resolved, unmount
from tests.support import mounttable, skips
from tests.support.mounts import mounted
from tests.support.stores import write_chain


@pytest.fixture
def root(public_path: Path) -> Path:
    """A directory with a store, a link to it, and a free mountpoint."""
    write_chain(public_path / "store", ["base", "leaf"])
    (public_path / "link").symlink_to("store")
    (public_path / "mnt").mkdir()
    (public_path / "full").mkdir()
    (public_path / "full" / "file").touch()
    (public_path / "store" / "base" / "inside").mkdir()
    (public_path / "to-inside").symlink_to("store/base/inside")
    (public_path / "over").mkdir()
    (public_path / "over" / "layers").mkdir()
    (public_path / "over" / "layers" / "diff").touch()
    (public_path / "to-layers").symlink_to("over/layers")
    (public_path / "dangling").symlink_to("nowhere")
    (public_path / "loop").symlink_to("loop")
    return public_path


NOT_THERE = "a mountpoint is an existing, empty directory"
# The mountpoint, the source, a layer (all below the root), and what is said.
REFUSED: dict[str, tuple[str, str | None, str | None, str]] = {
    "missing": ("none", "store", None, f"No such file or directory; {NOT_THERE}"),
    "no parent": ("none/none", "store", None, f"No such file or directory; {NOT_THERE}"),
    "dangling": ("dangling", "store", None, f"No such file or directory; {NOT_THERE}"),
    "loop": ("loop", "store", None, f"Too many levels of symbolic links; {NOT_THERE}"),
    "file": ("store/base/vmstate", None, None, f"Not a directory; {NOT_THERE}"),
    "full": ("full", "store", None, "not empty (1 entries); a mountpoint is an empty directory"),
    "source": ("store", "store", None, "is the source {}/store; mount it elsewhere"),
    "source by link": ("store", "link", None, "is the source {}/link; mount it elsewhere"),
    "link to it": ("link", "store", None, "is the source {}/store; mount it elsewhere"),
    "inside": ("store/base/inside", "store", None, "is inside the source {}/store; "),
    "inside by link": ("to-inside", "link", None, "is inside the source {}/link; "),
    "dots": ("full/../store", "store", None, "is the source {}/store; mount it elsewhere"),
    "above source": ("", "store", None, "lies above {}/store, which the mount would hide"),
    "above layer": ("over", None, "over/layers/diff", "lies above {}/over/layers/diff, which"),
    "above linked": ("over", None, "to-layers/diff", "lies above {}/to-layers/diff, which"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, root: Path) -> None:
    name, source, layer, text = REFUSED[case]
    mountpoint = os.path.join(root, name)
    layers = [os.path.join(root, layer)] if layer else []
    with pytest.raises(MountpointError) as caught:
        check_mountpoint(mountpoint, os.path.join(root, source) if source else None, layers)
    message = str(caught.value)
    assert message.startswith(f"{mountpoint}: {text.format(root)}")
    assert "\n" not in message


@pytest.mark.parametrize("name", ["mnt", "mnt/", "./store/../mnt", "free"])
def test_accepted(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "free").symlink_to("mnt")
    monkeypatch.chdir(root)
    assert check_mountpoint(name, "store", []) == str(root / "mnt")
    assert check_mountpoint(name, None, ["store/base/memory.bin"]) == str(root / "mnt")
    assert resolved(name) == str(root / "mnt")


def test_a_neighbour_whose_name_begins_the_same_is_not_inside(root: Path) -> None:
    (root / "store-views").mkdir()
    assert check_mountpoint(str(root / "store-views"), str(root / "store"), [])


@pytest.mark.parametrize("how", ["mnt", "free"])
def test_mounted_already(how: str, root: Path) -> None:
    (root / "free").symlink_to("mnt")
    with mounted(root / "store", root / "mnt"):
        with pytest.raises(MountpointError) as caught:
            check_mountpoint(str(root / how), str(root / "store"), [])
        assert str(caught.value) == f"{root / how}: {root}/store is mounted there already"
        entry = mount_entry(str(root / "mnt"))
        assert entry and (entry.kind, entry.source) == ("fuse.diffmergefs", f"{root}/store")
        assert mount_entry(str(root)) is None


def test_inside_our_own_mount(root: Path) -> None:
    with mounted(root / "store", root / "mnt"), pytest.raises(MountpointError, match="not empty"):
        check_mountpoint(str(root / "mnt" / "base"), str(root / "store"), [])


def test_an_empty_mount_of_another_type_is_a_directory_like_others(root: Path) -> None:
    skips.require_mounts()
    point = root / "mnt"
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(point)], check=True, timeout=60)
    with mounted(root / "store", point):
        assert sorted(os.listdir(point)) == ["base", "leaf"]
    assert [entry.fstype for entry in mounttable.at(str(point))] == ["tmpfs"]


ODD_NAMES = [
    *("with blank", "tab\there", "new\nline", "back\\slash", "c,omma", "#hash", "naïve 名前"),
    os.fsdecode(b"no utf-8 \xff"),
    "a, b\\, é",
    "lines\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\r",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names(name: str, root: Path) -> None:
    source, point = root / f"{name} source", root / name
    (root / "store").rename(source)
    point.mkdir()
    with mounted(source, point) as mount:
        assert sorted(os.listdir(point)) == ["base", "leaf"]
        entry = mount_entry(str(point))
        assert entry and (entry.kind, entry.source) == ("fuse.diffmergefs", str(source))
        assert mount_entry("/") is not None  # whose line is another one
        unmount(str(point))
        assert mount_entry(str(point)) is None
        assert mount.process.wait(60) == 0


@pytest.mark.parametrize("case", ["missing", "file", "full", "source", "above source"])
@pytest.mark.parametrize("options", [(), ("-f",)], ids=["background", "foreground"])
def test_the_command_says_it_in_one_line(case: str, options: tuple[str, ...], root: Path) -> None:
    name, _, _, text = REFUSED[case]
    command = [sys.executable, "-m", "diffmergefs", "mount", "--log", str(root / "log"), *options]
    done = subprocess.run(
        [*command, str(root / "store"), os.path.join(root, name).rstrip("/")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if case == "file":
        text = "is inside the source {}/store; mount it elsewhere"
    assert done.returncode == MountpointError.exit_code
    assert text.format(root) in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not mounttable.at(str(root / "mnt"))


def test_a_source_that_is_a_mount_is_no_obstacle(
    root: Path, filesystem: Callable[[str], Path]
) -> None:
    """The mountpoint may lie on the same file system as the source, beside it."""
    folder = filesystem("tmpfs")
    store = write_chain(folder / "store", ["base"])
    (folder / "mnt").mkdir()
    with mounted(store, folder / "mnt"):
        assert os.listdir(folder / "mnt") == ["base"]
