"""The settings that the kernel gets for a mount, and the log where one is not permitted."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from diffmergefs.system import tuning
from diffmergefs.system.tuning import Tuning, connection, tune

DEVICE = "0:45"


class Knobs:
    """Directories like those of the kernel, with plain files for the knobs."""

    def __init__(self, root: Path) -> None:
        self.readahead = root / "bdi" / DEVICE / "read_ahead_kb"
        self.background = root / "fuse" / "45" / "max_background"
        self.threshold = root / "fuse" / "45" / "congestion_threshold"
        found = {self.readahead: 128, self.background: 12, self.threshold: 9}
        for path, value in found.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{value}\n")

    def values(self) -> tuple[int, ...]:
        # Unlike the kernel's knobs, a file keeps the end of what is longer than the new value.
        knobs = (self.readahead, self.background, self.threshold)
        return tuple(int(path.read_text()) for path in knobs)


@pytest.fixture
def knobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Knobs:
    monkeypatch.setattr(tuning, "DEVICES", str(tmp_path / "bdi"))
    monkeypatch.setattr(tuning, "CONNECTIONS", str(tmp_path / "fuse"))
    return Knobs(tmp_path)


def said(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == level]


def test_what_a_restore_gains_most_from_is_the_default(knobs: Knobs) -> None:
    assert tune(DEVICE, Tuning()) == 128
    assert knobs.values() == (128, 64, 48)


def test_what_is_wanted_is_set(knobs: Knobs) -> None:
    assert tune(DEVICE, Tuning(readahead=1024, max_background=30)) == 1024
    assert knobs.values() == (1024, 30, 22)


def test_a_recording_mount_reads_ahead_one_page(
    knobs: Knobs, caplog: pytest.LogCaptureFixture
) -> None:
    knobs.readahead.write_text("9")
    assert tune(DEVICE, Tuning(recording=True)) == 4
    assert not said(caplog, logging.WARNING)


def test_a_record_that_is_inflated_is_warned_of(
    knobs: Knobs, caplog: pytest.LogCaptureFixture
) -> None:
    assert tune(DEVICE, Tuning(readahead=512, recording=True)) == 512
    (line,) = said(caplog, logging.WARNING)
    assert "the kernel reads ahead 512 KiB, not 4" in line


@pytest.mark.parametrize("asked", [False, True])
def test_what_is_missing_is_said_and_no_error(
    asked: bool, knobs: Knobs, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    wanted = Tuning(512, 30) if asked else Tuning()
    assert tune("0:46", wanted) is None
    lines = said(caplog, logging.WARNING if asked else logging.INFO)
    assert len(lines) == 3 and all("No such file or directory" in line for line in lines)
    assert "read_ahead_kb: the readahead in KiB stays as it is, not" in lines[0]
    assert len(caplog.records) == 3


def refuse(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Root may write to every file: what the kernel says to others is put in its mouth."""
    real = os.open

    def refusing(name: str, flags: int, *rest: int, **more: int) -> int:
        if name == str(path) and flags & os.O_WRONLY:
            raise PermissionError(13, "Permission denied", name)
        return real(name, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refusing)


def test_what_is_not_permitted_stays_and_is_said(
    knobs: Knobs, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, knobs.readahead)
    assert tune(DEVICE, Tuning(readahead=1024)) == 128
    (line,) = said(caplog, logging.WARNING)
    assert "read_ahead_kb: the readahead in KiB stays 128, not 1024: Permission denied" in line
    caplog.clear()
    # The default is what it is already: nothing was asked, and nothing is said.
    assert tune(DEVICE, Tuning()) == 128
    assert not said(caplog, logging.WARNING)
    assert tune(DEVICE, Tuning(recording=True)) == 128
    (line,) = said(caplog, logging.WARNING)
    assert "only root can set it" in line


def test_what_the_kernel_makes_of_it_is_said(
    knobs: Knobs, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_write", lambda path, value: None)
    assert tune(DEVICE, Tuning(readahead=10)) == 128
    assert "the kernel made the readahead in KiB 128, not 10" in said(caplog, logging.WARNING)[0]


def test_a_connection_has_the_devices_number(knobs: Knobs) -> None:
    assert connection(DEVICE) == str(knobs.background.parent)
    assert connection("1:45") == f"{knobs.background.parent.parent}/{(1 << 20) + 45}"
