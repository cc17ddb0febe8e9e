"""The program mount.diffmergefs: its options and its exit status."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffmergefs.cli.helper import main
from tests.support import mounttable
from tests.support.subjects.helper import USAGE, store

__all__ = ["store"]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("nonsense", "-o nonsense: unknown option"),
        ("open_rw,nonsense=3", "-o nonsense=3: unknown option"),
        ("page_size=7", "7 is not a power of two"),
        ("layout=other", "'other' is not one of"),
        ("allow_other=1", "does not take a value"),
        ("remount", "-o remount: the options of a mount cannot be changed"),
        ("foreground", "-o foreground: mount(8) would wait"),
        ("base=/a", "-o base=/a: SOURCE is already the base"),
        ("max_read=1", "-o max_read=1: diffmergefs sets it itself"),
    ],
)
def test_a_wrong_option_is_bad_usage(
    given: str, text: str, store: Path, mountpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([str(store), str(mountpoint), "-o", given]) == USAGE
    assert text in capfd.readouterr().err
    assert not mounttable.at(str(mountpoint))


@pytest.mark.parametrize("switches", [[], ["-s"], ["-f"], ["-sfnv"], ["-n", "-v"]], ids=str)
def test_all_of_mounts_own_options_are_taken(
    switches: list[str], store: Path, mountpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    known = (
        "rw,ro,defaults,suid,nosuid,dev,nodev,exec,noexec,auto,noauto,user,nouser,users,owner,"
        "group,nofail,_netdev,sync,async,dirsync,atime,noatime,relatime,strictatime,lazytime,"
        "diratime,nodiratime,silent,loud,mand,iversion,x-systemd.automount,x-systemd.requires=a,"
        "X-mount.mkdir=0755,user=nobody,comment=x,uhelper=udisks2,default_permissions,,"
        'context="system_u:object_r:x:s0:c1,c2",fscontext=a,defcontext=b,rootcontext="c,d",'
        'x-y="a,b"'
    )
    arguments = [str(store), str(mountpoint), *switches, "-o", known, "-f", "-t"]
    assert main([*arguments, "fuse.diffmergefs"]) == 0
    assert capfd.readouterr() == ("", "")
    assert main([*arguments, "ext4"]) == USAGE
    assert "-t ext4: only fuse.diffmergefs is supported" in capfd.readouterr().err
    assert not mounttable.at(str(mountpoint))


@pytest.mark.parametrize("source", ["none", "/b"])
def test_a_base_may_be_named_as_an_option_too(
    source: str, mountpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([source, str(mountpoint), "-f", "-o", "base=/b,diff=/c"]) == 0
    assert main([source, str(mountpoint), "-f", "-o", "base=/b,base=/d"]) == USAGE
    assert "-o base=/d: SOURCE is already the base" in capfd.readouterr().err


def test_usage_and_bugs_have_mounts_statuses(
    monkeypatch: pytest.MonkeyPatch, mountpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([]) == USAGE
    assert main(["--nonsense"]) == USAGE
    missing, unknown = capfd.readouterr().err.splitlines()
    assert missing.endswith("Missing argument 'SOURCE'; see mount.fuse.diffmergefs --help")
    assert "--nonsense" in unknown
    monkeypatch.setattr("diffmergefs.cli.mount.Request", lambda **_: 1 // 0)
    assert main(["/nowhere", str(mountpoint)]) == 4
    assert "this is a bug" in capfd.readouterr().err

    def interrupt(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("diffmergefs.cli.mount.Request", interrupt)
    assert main(["/nowhere", str(mountpoint)]) == 8
