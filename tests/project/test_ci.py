"""What CI runs: in which environment, and with which lowest versions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.places import REPOSITORY


@pytest.fixture
def fake_make(tmp_path: Path) -> Path:
    """A directory with a `make` that says its target and its environment, in place of the real."""
    make = tmp_path / "bin" / "make"
    make.parent.mkdir()
    # It ends with what is in the file `status`, if there is one.
    status = f"cat {tmp_path}/status 2>/dev/null || echo 0"
    make.write_text(f'#!/bin/sh\necho "target $1"\nenv\nexit "$({status})"\n')
    make.chmod(0o755)
    return make.parent


def run(fake_make: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [REPOSITORY / ".ci" / "run"],
        env={"PATH": f"{fake_make}:{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_all_lanes_run_in_an_environment_of_their_own(fake_make: Path) -> None:
    kept = {
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "CI": "true",
        "HTTPS_PROXY": "http://proxy:1",
        "no_proxy": "here, there",
        "SSL_CERT_FILE": "/etc/ssl/cert.pem",
        "PIP_INDEX_URL": "https://index/simple",
    }
    left_out = {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "TERM": "xterm", "X": "y"}
    done = run(fake_make, **kept, **left_out)
    assert (done.returncode, done.stderr) == (0, "")
    lanes = done.stdout.split("target ")[1:]
    targets = ["check", "test-lowest", "test-packages", "test"]
    assert [lane.split("\n")[0] for lane in lanes] == targets
    for lane in lanes:
        found = dict(line.split("=", 1) for line in lane.splitlines()[1:])
        assert {name: found.get(name) for name in kept} == kept
        assert found.keys() <= kept.keys() | {"PATH", "PWD", "OLDPWD", "SHLVL", "_"}


def test_the_files_that_the_lowest_versions_are_tested_with_exist() -> None:
    command = ["make", "--dry-run", "test-lowest"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    found = re.findall(r"\btests/\S+\.py", done.stdout)
    assert len(found) > 10, done
    assert [name for name in found if not (REPOSITORY / name).exists()] == []


def test_a_lane_that_fails_fails_the_run(fake_make: Path) -> None:
    (fake_make.parent / "status").write_text("2")
    done = run(fake_make)
    assert done.returncode == 2
    assert done.stdout.count("target ") == 1


def lowest(path: Path) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [sys.executable, REPOSITORY / ".ci" / "lowest", path]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_each_lower_bound_is_the_version_of_that_lane() -> None:
    document = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    project = document["project"]
    required = [*document["build-system"]["requires"], *project["dependencies"]]
    required += [name for names in project["optional-dependencies"].values() for name in names]
    bounded = {one.partition(",")[0].replace(">=", "==") for one in required if ">=" in one}
    assert len(bounded) > 8
    assert set(lowest(REPOSITORY / "pyproject.toml").stdout.splitlines()) == bounded
    # What the program runs on has a bound without exception.
    assert all(">=" in requirement for requirement in project["dependencies"])


@pytest.mark.parametrize(
    ("requirement", "complaint"),
    [("click~=8.1", "not of the form: click~=8.1"), ("rich>=12", "two lower bounds of rich")],
)
def test_a_bound_that_cannot_be_tested_is_refused(
    tmp_path: Path, requirement: str, complaint: str
) -> None:
    path = tmp_path / "pyproject.toml"
    path.write_text(
        f'[build-system]\nrequires = ["rich>=13"]\n[project]\ndependencies = ["{requirement}"]\n'
        "[project.optional-dependencies]\n"
    )
    done = lowest(path)
    assert done.returncode == 1 and complaint in done.stderr
