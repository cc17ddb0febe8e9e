"""What doctor finds on file systems that trouble a diff."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs.checks.doctor import examine_path
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.writing.sealing import seal_layer
from tests.support import loopfs
from tests.support.images import PAGE, write_layer
from tests.support.stores import write_chain, write_tag
from tests.support.subjects.doctor import examined, memory, of, store

__all__ = ["store"]

MIB = 1 << 20


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_preallocated_diff_is_wrong(kind: str, filesystem: Callable[[str], Path]) -> None:
    diff = write_layer(filesystem(kind) / "mem_diff", 4 * MIB, [])
    subprocess.run(["fallocate", "-o", f"{MIB}", "-l", f"{MIB}", diff], check=True)
    assert ("unwritten", "wrong") in of(examined(diff), diff)


def test_a_diff_on_a_coarse_grain_is_wrong(filesystem: Callable[[str], Path]) -> None:
    diff = write_layer(filesystem("xfs16k") / "mem_diff", 4 * MIB, [(0, b"x" * PAGE)])
    found = [f for f in examine_path(str(diff)) if f.severity == "wrong"]
    assert [(f.subject, f.check) for f in found] == [
        (str(diff.parent), "grain"),
        (str(diff), "grain"),
    ]
    assert [
        f for f in examine_path(str(diff), TrustPolicy(page_size=16384)) if f.severity == "wrong"
    ] == []


def test_a_copy_up_is_wrong_over_a_parents_data(overlay_fs: loopfs.Overlay) -> None:
    write_tag(overlay_fs.lower, "base", numbers=range(300), size=4 * MIB)
    write_tag(overlay_fs.lower, "work", "base", layer=1, numbers=[5], size=4 * MIB)
    diff = memory(overlay_fs.merged, "work")
    assert of(list(examine_path(str(diff))), diff) == [("extents", "fine"), ("no-seal", "warning")]
    diff.chmod(0o600)
    (wrong,) = (f for f in examine_path(str(diff)) if f.subject == str(diff))
    assert (wrong.check, wrong.severity) == ("copy-up", "wrong")
    extent = f"[{5 * PAGE}, {5 * PAGE + MIB})"
    assert wrong.finding.startswith(f"the extent {extent} on overlayfs has 255 pages of zeros")
    seal_layer(diff)
    assert of(list(examine_path(str(diff))), diff) == [("extents", "fine")]


def test_a_copy_up_is_a_warning_where_the_parent_is_not_known(overlay_fs: loopfs.Overlay) -> None:
    write_layer(overlay_fs.lower / "mem_diff", 4 * MIB, [(5 * PAGE, b"x" * PAGE)])
    diff = overlay_fs.merged / "mem_diff"
    diff.chmod(0o600)
    assert of(list(examine_path(str(diff))), diff) == [("copy-up", "warning")]


@pytest.mark.parametrize("kind", ["squashfs", "erofs"])
def test_a_filesystem_that_is_not_on_the_list_is_wrong_for_diffs_only(
    kind: str, tmp_path: Path, filesystem: Callable[[str], Path]
) -> None:
    store = write_chain(tmp_path / "store", ["base", "work"])
    with loopfs.packed(kind, store, filesystem("ext4")) as root:
        found = list(examine_path(str(root)))
        assert ("filesystem", "wrong") in of(found, root)
        assert of(found, memory(root, "base")) == [("base", "fine")]
        assert ("filesystem", "wrong") in of(found, memory(root, "work"))
