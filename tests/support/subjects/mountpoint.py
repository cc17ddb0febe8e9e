"""A directory with good and bad mountpoints, and why the bad ones are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

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
    "full": ("full", "store", None, "not empty (1 file); a mountpoint is an empty directory, and"),
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
