"""`install-extras`: links to what pip installed, where the system looks, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffmergefs import cli
from diffmergefs.cli import extras
from diffmergefs.cli.helper import NAME as HELPER
from diffmergefs.core import errors
from diffmergefs.system import installation

LINKED = [
    "bin/diffmergefs",
    "share/man/man1/diffmergefs.1",
    "share/man/man1/diffmergefs-mount.1",
    f"share/man/man8/{HELPER}.8",
    "share/bash-completion/completions/diffmergefs",
    "share/zsh/site-functions/_diffmergefs",
    "share/fish/vendor_completions.d/diffmergefs.fish",
]
FOR_ALL = [f"bin/{HELPER}", "share/doc/diffmergefs/diffmergefs@.service"]
NOT_LINKED = ["share/doc/diffmergefs/install.md", "lib/python3/site-packages/diffmergefs/cli.py"]


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The prefix of an installation by pip, for a user whose home is `tmp_path`/home."""
    prefix = tmp_path / "env"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", f"/bin:{tmp_path}/home/.local/bin")
    install(prefix, monkeypatch, [*LINKED, *FOR_ALL, *NOT_LINKED])
    return prefix


def install(prefix: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
    files = [prefix / name for name in names]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    monkeypatch.setattr(installation, "installed_files", lambda: files)


def run(*arguments: str) -> int:
    return cli.main(["install-extras", *arguments])


def links_below(root: Path) -> dict[str, str]:
    """Every link below a directory, by its relative path; fails if there is any other file."""
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            found[str(path.relative_to(root))] = str(path.readlink())
    return found


def test_a_user_gets_links_below_local(
    environment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # again, as after an upgrade
        assert run() == 0
        home = tmp_path / "home/.local"
        assert links_below(home) == {name: str(environment / name) for name in LINKED}
        printed = capsys.readouterr()
        lines = sorted(f"{home / name} -> {environment / name}" for name in LINKED)
        assert sorted(printed.out.splitlines()) == lines
        (line,) = printed.err.splitlines()
        assert f"fpath+=({home}/share/zsh/site-functions)" in line


def test_root_gets_the_helper_and_the_unit_too(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    wanted = extras.links(installation.installed_files(), Path("/usr/local"), is_for_all=True)
    below = {Path("/usr/local") / name: environment / name for name in LINKED}
    assert wanted == below | {
        Path("/sbin") / HELPER: environment / FOR_ALL[0],
        Path("/usr/local/lib/systemd/system/diffmergefs@.service"): environment / FOR_ALL[1],
    }
    # With a prefix of one's own nothing is changed outside of it.
    assert run(f"--prefix={tmp_path}/own") == 0
    assert links_below(tmp_path / "own").keys() == set(LINKED)


def test_the_links_are_removed_and_those_of_others_are_not(
    environment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home/.local"
    assert run() == 0
    other = home / "share/man/man1/diffmergefs.1"
    other.unlink()
    other.symlink_to("/opt/another/share/man/man1/diffmergefs.1")
    capsys.readouterr()
    assert run("--uninstall") == 0
    assert list(links_below(home)) == ["share/man/man1/diffmergefs.1"]
    removed = capsys.readouterr().out.splitlines()
    assert f"removed {home}/bin/diffmergefs" in removed and len(removed) == len(LINKED) - 1
    assert run("--uninstall") == 0
    assert capsys.readouterr().out == ""


def test_links_of_another_installation_are_replaced(environment: Path, tmp_path: Path) -> None:
    link = tmp_path / "home/.local/bin/diffmergefs"
    link.parent.mkdir(parents=True)
    link.symlink_to("/opt/gone/bin/diffmergefs")
    assert run() == 0
    assert link.readlink() == environment / "bin/diffmergefs"


def test_what_a_newer_version_lacks_loses_its_link(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run() == 0
    install(environment, monkeypatch, [name for name in LINKED if "-mount.1" not in name])
    assert run() == 0
    left = links_below(tmp_path / "home/.local").keys()
    assert left == {name for name in LINKED if "-mount.1" not in name}


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_not_ours_is_not_replaced_and_nothing_is_linked(
    kind: str, environment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "home/.local/share/man/man1/diffmergefs.1"
    theirs.parent.mkdir(parents=True)
    if kind == "file":
        theirs.write_text("mine")
    elif kind == "directory":
        theirs.mkdir()
    else:
        theirs.symlink_to("/usr/share/man/man1/ls.1")
    before = theirs.lstat()
    assert run() == errors.OutputRefusedError.exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{theirs}: exists, and is not a link to diffmergefs" in line
    assert theirs.lstat().st_ino == before.st_ino
    assert os.listdir(tmp_path / "home/.local") == ["share"]


def test_a_link_onto_itself_is_not_made(
    environment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """pip may have installed to that prefix itself, as `pip install --user` does."""
    assert run(f"--prefix={environment}") == 0
    assert capsys.readouterr().out == ""
    assert all((environment / name).is_file() for name in LINKED)
    assert not any((environment / name).is_symlink() for name in LINKED)


def test_an_editable_installation_says_what_it_lacks(
    environment: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install(environment, monkeypatch, ["bin/diffmergefs", f"bin/{HELPER}"])
    monkeypatch.setenv("PATH", "/bin")
    assert run() == 0
    assert links_below(tmp_path / "home/.local").keys() == {"bin/diffmergefs"}
    of_path, of_pages = capsys.readouterr().err.splitlines()
    assert ".local/bin is not in your PATH" in of_path
    assert "an editable installation has no man pages" in of_pages


def test_a_directory_that_may_not_be_written_is_one_line(
    environment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "home").write_text("a file")
    assert run() == errors.FileAccessError.exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/home" in line and "Not a directory" in line


def test_where_there_is_nothing_to_link_that_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(installation, "installed_files", lambda: [])
    assert run() == errors.FileAccessError.exit_code
    monkeypatch.setattr(installation, "is_packaged", lambda: True)
    assert run() == errors.OutputRefusedError.exit_code
    first, second = capsys.readouterr().err.splitlines()
    assert "pip did not install diffmergefs" in first
    assert "a package of the distribution has put everything in place" in second
