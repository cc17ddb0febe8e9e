"""A mount's options, and why it cannot be made."""

from __future__ import annotations

import os
from typing import Any, cast

import pyfuse3
import pytest

from diffmergefs.core.errors import MountFailedError
from diffmergefs.fuse import mounting
from diffmergefs.fuse.mounting import mount, session_options

# Options


def options(*extra: str, source: str = "/store", **given: bool) -> set[str]:
    return session_options(source, extra, **({"allow_other": False, "open_rw": False} | given))


def test_a_session_is_read_only_unless_programs_open_files_for_writing() -> None:
    always = {"fsname=/store", "subtype=diffmergefs", "default_permissions"}
    always |= {"nosuid", "nodev", "noexec"}
    assert options() == {*always, "ro"}
    assert options(open_rw=True) == always
    assert options(allow_other=True) == {*always, "ro", "allow_other"}
    assert options("noatime", "x=y") == {*always, "ro", "noatime", "x=y"}


def test_a_comma_and_a_backslash_of_a_source_or_a_value_are_escaped() -> None:
    assert "fsname=/a\\,b\\\\c" in options(source="/a,b\\c")
    assert 'context="a:c1\\,c2"' in options('context="a:c1,c2"')


# A mount that cannot be made


def refused(
    monkeypatch: pytest.MonkeyPatch,
    *options: str,
    obstacles: list[str],
    said: str = "",
) -> str:
    """The error of a session for which libfuse cannot mount."""
    given: list[bytes] = []

    def init(operations: object, mountpoint: str, options: set[str]) -> None:
        given.extend(sorted(option.encode() for option in options))
        os.write(2, said.encode())
        raise RuntimeError("fuse_session_mount failed")

    monkeypatch.setattr(pyfuse3, "init", init)
    monkeypatch.setattr(mounting, "obstacles", lambda: obstacles)
    with pytest.raises(MountFailedError) as caught:
        mount(cast(Any, None), "/mnt", {*options})
    assert given == sorted(map(os.fsencode, options))
    return str(caught.value)


def test_it_says_what_is_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    found = refused(monkeypatch, "ro", obstacles=["no /dev/fuse", "no fusermount3"])
    assert found == "/mnt: cannot be mounted: no /dev/fuse; no fusermount3"
    found = refused(monkeypatch, "fsname=/a\udcff", obstacles=[])
    assert found == (
        "/mnt: cannot be mounted: fuse_session_mount failed; `diffmergefs doctor` shows what"
        " mounting needs"
    )


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("noise\nfuse: mount failed: Too many users\n", "fuse: mount failed: Too many users; "),
        ("fusermount3: user has no write access to mountpoint /mnt\n", "; mount on a directory"),
        ("fusermount3: mountpoint /mnt not owned by user\n", "; mount on a directory that this"),
    ],
)
def test_what_libfuse_says_is_the_cause_and_goes_nowhere_else(
    said: str,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    found = refused(monkeypatch, obstacles=[], said=said)
    cause = said.splitlines()[-1]
    assert found.startswith(f"/mnt: cannot be mounted: {cause}; ") and text in found
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("user", "may", "is_the_reason"), [(1000, False, True), (1000, True, False), (0, False, False)]
)
def test_an_ordinary_user_may_lack_the_permission_to_let_others_in(
    user: int, may: bool, is_the_reason: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(mounting, "others_may_be_let_in", lambda: may)
    found = refused(monkeypatch, "allow_other", obstacles=["another reason"])
    line = (
        "/mnt: cannot be mounted: --allow-other needs the line user_allow_other in /etc/fuse.conf"
    )
    assert found.startswith(line) == is_the_reason
    assert ("another reason" in found) != is_the_reason
