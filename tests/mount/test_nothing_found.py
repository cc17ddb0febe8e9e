"""What a mount says of a SOURCE without snapshots, and of what it passes over."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from diffmergefs.cli import logs
from tests.support import mounttable
from tests.support.commands import diffmergefs, mistake
from tests.support.images import write_layer
from tests.support.mounts import mounted
from tests.support.stores import SIZE, write_chain

NO_SYSLOG = [] if os.path.exists(logs.SYSLOG) else ["diffmergefs: no syslog answers at /dev/log"]


def mount_lines(*arguments: str | Path) -> list[str]:
    """What a mount in the background says on stderr. It is unmounted again."""
    done = diffmergefs("mount", *arguments)
    try:
        assert (done.returncode, done.stdout) == (0, ""), done
        return done.stderr.splitlines()
    finally:
        mounttable.unmount_below(str(arguments[-1]))


def test_an_empty_source_is_mounted_with_a_line(public_path: Path, mountpoint: Path) -> None:
    source = public_path / "store"
    source.mkdir()
    line, *rest = mount_lines(source, mountpoint)
    assert line.startswith(f"diffmergefs: {source}: no snapshots: it is empty; ")
    assert [each.partition(",")[0] for each in rest] == NO_SYSLOG
    with mounted(source, mountpoint, expect_log=("no snapshots: it is empty",)) as mount:
        assert os.listdir(mountpoint) == []
        assert mount.log().count("no snapshots: ") == 1


def test_snapshot_files_of_firecracker_are_named_with_the_way(
    public_path: Path, mountpoint: Path
) -> None:
    (public_path / "vm").mkdir()
    for name in ("mem_file", "snapshot_file"):
        write_layer(public_path / "vm" / name, SIZE, [])
    line = mount_lines(public_path / "vm", mountpoint)[0]
    assert "snapshot files of Firecracker (mem_file, snapshot_file)" in line
    assert "diffmergefs mount --base FULL --diff DIFF MOUNTPOINT" in line


def test_what_is_passed_over_is_said_on_the_terminal_and_logged(
    public_path: Path, mountpoint: Path
) -> None:
    store = write_chain(public_path / "store", ["base", "work"])
    (store / "latest").symlink_to("work")
    (store / "scratch").mkdir()
    said = [f"{store}/latest: passed over: a symlink", f"{store}/scratch: passed over: no snapshot"]
    lines = mount_lines("--log", public_path / "log", store, mountpoint)
    assert [line[: len(text) + 13] for line, text in zip(lines, said, strict=True)] == [
        f"diffmergefs: {text}" for text in said
    ]
    log = (public_path / "log").read_text()
    assert all(f" INFO diffmergefs: {text}" in log for text in said)


@pytest.mark.parametrize("front", [True, False])
def test_one_snapshot_as_source_is_refused(
    front: bool, public_path: Path, mountpoint: Path
) -> None:
    store = write_chain(public_path / "store", ["base", "work"])
    line = mistake(
        3, "mount", *["-f"] * front, "--log", public_path / "log", store / "work", mountpoint
    )
    assert line.endswith(f"mount or list its parent directory, {store}\n")
    assert not mounttable.at(str(mountpoint))


def test_the_mount_of_an_empty_source_shows_what_comes(public_path: Path, mountpoint: Path) -> None:
    source = public_path / "store"
    source.mkdir()
    with mounted(source, mountpoint, expect_log=("no snapshots: it is empty",)):
        write_chain(source, ["base"])
        command = ["sh", "-c", f"until [ -e {mountpoint}/base ]; do sleep 0.2; done"]
        subprocess.run(command, check=True, timeout=60)
