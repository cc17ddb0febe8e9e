"""The verb demo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from diffmergefs.cli.demo import CONTENTS
from tests.support import mounttable, skips
from tests.support.commands import mistake, succeed
from tests.support.places import REPOSITORY


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_demo_does_it_all_and_leaves_nothing(tmp_path: Path, option: list[str]) -> None:
    skips.require_fuse()
    # Not by `python -m`: then root believes no TMPDIR.
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from diffmergefs import cli; sys.exit(cli.main(sys.argv[1:]))",
            "demo",
            *option,
        ],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    if option:
        found = json.loads(done.stdout)
        assert found["ok"] is True
        steps = found["steps"]
    else:
        steps = done.stdout.splitlines()
    words = ["made", "mounted", "read", "flattened", "unmounted"]
    assert len(steps) == len(words)
    assert all(word in step for word, step in zip(words, steps, strict=True))
    assert os.listdir(tmp_path) == []
    assert not mounts_below(tmp_path)


def test_kept_files_are_what_the_commands_that_it_lists_need(public_path: Path) -> None:
    """Typed as they stand, in a shell that knows nothing of this environment."""
    skips.require_fuse()
    folder = public_path / "a user's demo"
    said = succeed("demo", "--keep", folder)
    kept, typed = said.split("\nTry next:\n")
    for name in CONTENTS:
        assert (folder / name).exists() and f"\n  {name} " in kept
    assert set(CONTENTS) <= set(os.listdir(folder))
    assert {"snapshot_file", "snapshot_diff"} == set(os.listdir(folder)) - set(CONTENTS)
    commands = [line.strip() for line in typed.splitlines() if line.startswith("  ")]
    done = subprocess.run(
        ["bash", "-e"],
        input="\n".join(commands),
        cwd="/",
        env={"PATH": os.defpath, "HOME": str(public_path), "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done
    assert "memory.bin" in done.stdout  # of the mount
    assert not mounts_below(public_path)
    assert {"whole.mem", "small"} <= set(os.listdir(folder))


def test_as_json_it_tells_what_it_kept(public_path: Path) -> None:
    skips.require_fuse()
    folder = public_path / "demo"
    found = json.loads(succeed("demo", "--json", "--keep", folder))
    assert (found["ok"], found["kept"]) == (True, str(folder))
    assert f"cd {folder}" in found["next"]


def test_an_empty_directory_is_filled(public_path: Path) -> None:
    skips.require_fuse()
    succeed("demo", "--keep", public_path)
    assert set(CONTENTS) <= set(os.listdir(public_path))


def test_what_is_there_is_not_touched(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for path in (tmp_path, file):
        line = mistake(8, "demo", "--keep", path)
        wanted = "exists, and is not an empty directory; name a new one"
        assert line == f"diffmergefs: {path}: {wanted}\n"
    assert os.listdir(tmp_path) == ["file"] and file.read_text() == "mine"


def test_on_a_full_disk_there_is_one_line(public_path: Path) -> None:
    skips.require_mounts()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", public_path], check=True)
    try:
        line = mistake(9, "demo", "--keep", public_path / "demo")
        assert "No space left on device" in line and "make room" in line
        assert os.listdir(public_path) == []
    finally:
        mounttable.unmount(str(public_path))


def make_demo(folder: Path) -> subprocess.CompletedProcess[str]:
    # The environment is there: `-o` tells make that it is up to date.
    variables = [f"VENV={sys.prefix}", f"DEMO={folder}"]
    stamp = f"{sys.prefix}/.stamp-run"
    command = ["make", "--directory", str(REPOSITORY), "-o", stamp, "demo", *variables]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_make_demo_ends_with_what_to_try_and_begins_anew_each_time(public_path: Path) -> None:
    skips.require_fuse()
    folder = public_path / "demo"
    for _ in range(2):
        done = make_demo(folder)
        assert done.returncode == 0, done
        assert f"\n  cd {folder}\n  diffmergefs list snapshots\n" in done.stdout
        (folder / "whole.mem").touch()
    log = public_path / "log"
    succeed("mount", "--log", log, folder / "snapshots", folder / "views")
    try:
        done = make_demo(folder)
        assert done.returncode == 2 and "something is mounted in it" in done.stderr
        assert (folder / "whole.mem").exists()
    finally:
        succeed("umount", folder / "views")


# A descriptor, not a file of Python's: since 3.13 such a one says that it could not be closed.
FAILING = """
import os
import sys
from diffmergefs import cli
from diffmergefs.cli import demo

held = []

def failing(path, expected):
    held.append(os.open(path, os.O_RDONLY))
    raise OSError(5, "Input/output error", "probe")

demo._require_equal = failing
sys.exit(cli.main(["demo", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("kept", ["", "new", "there"])
def test_a_demo_that_fails_leaves_nothing(kept: str, tmp_path: Path) -> None:
    """Not even where somebody has a file of its view open."""
    skips.require_fuse()
    there = ["there"] if kept == "there" else []
    for name in there:
        (tmp_path / name).mkdir()
    done = subprocess.run(
        [sys.executable, "-c", FAILING, *(["--keep", str(tmp_path / kept)] if kept else [])],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (
        14,
        "diffmergefs: probe: Input/output error; check the storage\n",
    )
    assert os.listdir(tmp_path) == there and not any(os.listdir(tmp_path / name) for name in there)
    assert not mounts_below(tmp_path)
    assert not processes_that_name(tmp_path)


def mounts_below(path: Path) -> list[str]:
    return [entry.path for entry in mounttable.entries() if entry.path.startswith(str(path))]


def processes_that_name(path: Path) -> list[str]:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if os.fsencode(path) in Path(f"/proc/{name}/cmdline").read_bytes():
                found.append(name)
    return found
