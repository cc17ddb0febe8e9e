"""Mount options against those of real file systems."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from diffmergefs.system.mounttable import mount_of
from tests.support import loopfs
from tests.support.subjects.mounttable import opened


def test_options_are_those_of_the_filesystem(
    overlay_fs: loopfs.Overlay, filesystem: Callable[[str], Path]
) -> None:
    with opened(overlay_fs.merged) as fd:
        found = mount_of(fd)
        assert found is not None and found.kind == "overlay"
        assert f"upperdir={overlay_fs.upper}" in found.options
        assert (found.root, found.path) == ("/", str(overlay_fs.merged))
        device = os.fstat(fd).st_dev
        assert found.device == f"{os.major(device)}:{os.minor(device)}"
    with opened(filesystem("tmpfs_huge")) as fd:
        found = mount_of(fd)
        assert found is not None and "huge=always" in found.options
