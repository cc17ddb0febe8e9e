"""`completion`: real shells complete what a user began to type."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from diffmergefs.cli.completion import SHELLS
from diffmergefs.cli.verbs import TABLE
from tests.support.commands import diffmergefs, succeed
from tests.support.mounts import mounted
from tests.support.stores import write_chain
from tests.support.terminals import SET_UP, STARTS, shell_on_a_terminal

_SECONDS = 40
# What is typed, and what the line is when it was completed.
LINES = {
    "diffmergefs fla": "diffmergefs flatten ",
    "diffmergefs mount --allow-ot": "diffmergefs mount --allow-other ",
    "diffmergefs mount --log-format jo": "diffmergefs mount --log-format journald",
    "diffmergefs mount -o open_rw,all": "diffmergefs mount -o open_rw,allow_",
    "diffmergefs mount some-f": "diffmergefs mount some-file",
    "diffmergefs info other-f": "diffmergefs info other-file",
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory with the command as a program, two files, and the scripts of all shells."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "diffmergefs"
    call = "import sys; from diffmergefs.cli import main; sys.exit(main())"
    command.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -c '{call}' \"$@\"\n")
    command.chmod(0o755)
    for shell in SHELLS:
        (tmp_path / f"script.{shell}").write_text(succeed("completion", shell))
    (tmp_path / "some-file").touch()
    (tmp_path / "other-file").touch()
    return tmp_path


def environment(home: Path) -> dict[str, str]:
    return {
        "PATH": f"{home}/bin:{os.environ['PATH']}",
        "HOME": str(home),
        "TERM": "dumb",
        "LC_ALL": "C.UTF-8",
    }


def completions(directory: Path, *words: str) -> list[str]:
    """What bash is offered for the last word."""
    done = diffmergefs(
        cwd=directory,
        _DIFFMERGEFS_COMPLETE="bash_complete",
        COMP_WORDS=shlex.join(["diffmergefs", *words]),
        COMP_CWORD=str(len(words)),
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    return [line.partition(",")[2] for line in done.stdout.splitlines() if line]


def test_mountpoints_are_offered_where_a_mount_is_named(
    public_path: Path, mountpoint: Path
) -> None:
    store = write_chain(public_path / "store", ["base"])
    with mounted(store, mountpoint):
        for verb in ("umount", "unmount", "status"):
            assert completions(public_path, verb, f"{public_path}/m") == [str(mountpoint)]
            assert str(mountpoint) in completions(public_path, verb, "")
            assert completions(public_path, verb, f"{public_path}/s") == [f"{public_path}/s"]


def test_tags_of_the_image_are_offered_to_squash(tmp_path: Path) -> None:
    write_chain(tmp_path / "store", ["base", "work", "leaf"])
    image = f"{tmp_path}/store/leaf"
    assert completions(tmp_path, "squash", image, "--from", "") == ["work", "leaf"]
    assert completions(tmp_path, "squash", image, "--to", "l") == ["leaf"]
    for nothing in ([], [f"{tmp_path}/none"], [str(tmp_path)]):
        assert completions(tmp_path, "squash", *nothing, "--from", "") == []


def test_verbs_are_offered_with_help_among_them(tmp_path: Path) -> None:
    assert completions(tmp_path, "") == [*TABLE, "help"]
    assert completions(tmp_path, "help", "fl") == ["flatten"]


@pytest.mark.parametrize("shell", STARTS)
def test_a_tabulator_completes(shell: str, home: Path) -> None:
    set_up = f"{SET_UP[shell]}; source ./script.{shell}"
    with shell_on_a_terminal(STARTS[shell], set_up, home, environment(home)) as terminal:
        for typed, completed in LINES.items():
            terminal.complete(typed, completed)


def test_zsh_completes_where_it_loads_the_script_as_a_function(home: Path) -> None:
    (home / "functions").mkdir()
    (home / "script.zsh").rename(home / "functions/_diffmergefs")
    set_up = f"fpath+=({home}/functions); {SET_UP['zsh']}"
    with shell_on_a_terminal(STARTS["zsh"], set_up, home, environment(home)) as terminal:
        for typed, completed in LINES.items():
            terminal.complete(typed, completed)


def test_fish_completes(home: Path) -> None:
    # What has a comma in it click's script for fish takes apart: there, of -o only the first.
    lines = {typed: line for typed, line in LINES.items() if "," not in line}
    lines["diffmergefs mount -o allow_ot"] = "diffmergefs mount -o allow_other"
    for typed, completed in lines.items():
        done = subprocess.run(
            ["fish", "--no-config", "-c", f"source script.fish; complete -C {shlex.quote(typed)}"],
            capture_output=True,
            text=True,
            cwd=home,
            env=environment(home),
            timeout=_SECONDS,
            check=True,
        )
        word = completed.split()[-1]
        offered = [line.partition("\t")[0] for line in done.stdout.splitlines()]
        assert offered and all(line.startswith(word) for line in offered), (typed, done)


def test_another_shell_is_bad_usage() -> None:
    done = diffmergefs("completion", "tcsh")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'tcsh' is not one of 'bash', 'zsh', 'fish'" in done.stderr
