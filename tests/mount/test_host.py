"""What doctor finds on a host that can mount."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs.cli import doctor
from diffmergefs.system import children
from tests.support import mounttable, skips
from tests.support.commands import succeed
from tests.support.subjects.host import found


@pytest.fixture(scope="session")
def root() -> None:
    skips.require_root()


def test_the_device_can_be_opened() -> None:
    skips.require_fuse()
    assert found("device").severity == "fine"


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    ("mode", "uid", "severity", "text"),
    [
        (None, 0, "warning", "no fusermount3 in $PATH"),
        (0o755, 0, "warning", "{} is not setuid root"),
        (0o4755, 1, "warning", "{} is not setuid root"),
        (0o4755, 0, "fine", "{} mounts for ordinary users"),
    ],
)
def test_fusermount3(
    mode: int | None,
    uid: int,
    severity: str,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    helper = tmp_path / "fusermount3"
    if mode is not None:
        helper.touch()
        os.chown(helper, uid, 0)
        helper.chmod(mode)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (found("helper").severity, found("helper").finding) == (severity, text.format(helper))


def test_the_library_can_be_imported() -> None:
    finding = found("pyfuse3")
    assert finding.severity == "fine" and finding.finding.startswith("pyfuse3 3.")


WITHOUT_THE_RIGHT = ["setpriv", "--bounding-set=-sys_admin", sys.executable, "-m", "diffmergefs"]


@pytest.mark.usefixtures("root")
def test_doctor_tries_the_act(tmp_path: Path) -> None:
    skips.require_fuse()
    if not skips.may_mount():
        pytest.skip(skips.NO_MOUNTS)
    assert "  fine     a view was mounted and read" in succeed("doctor").splitlines()
    done = subprocess.run(
        [*WITHOUT_THE_RIGHT, "doctor", "--json"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    findings = {each["check"]: each for each in json.loads(done.stdout)}
    assert findings["right"]["severity"] == "warning"
    assert findings["mount"]["severity"] == "wrong"
    assert "a view cannot be mounted: " in findings["mount"]["finding"]
    assert "without CAP_SYS_ADMIN" in findings["mount"]["finding"]


@pytest.mark.usefixtures("root")
def test_the_act_is_seen_by_nobody_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skips.require_fuse()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    seen = []

    def looking(question: Callable[[], bytes]) -> bytes:
        seen.append([entry.path for entry in mounttable.entries()])
        return children.ask(question)

    monkeypatch.setattr(doctor, "ask", looking)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert doctor.try_mount().severity == "fine"
    assert not [path for path in seen[0] if path.startswith(str(tmp_path))]
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("wrong", ["other bytes", "no answer"])
def test_a_view_that_is_not_what_it_should_be_is_wrong(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    skips.require_fuse()
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    def answer(question: Callable[[], bytes]) -> bytes:
        if wrong == "no answer":
            raise TimeoutError("no answer")
        return b"x"

    monkeypatch.setattr(doctor, "ask", answer)
    assert doctor.try_mount().severity == "wrong"


@pytest.mark.usefixtures("root")
def test_a_mount_that_fails_names_only_what_is_amiss(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "base").write_bytes(bytes(4096))
    command = [*WITHOUT_THE_RIGHT, "mount", "--base", str(tmp_path / "base"), str(tmp_path / "mnt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 11
    line = done.stderr.splitlines()[-1]
    assert "root without CAP_SYS_ADMIN" in line and "/dev/fuse there" not in line
