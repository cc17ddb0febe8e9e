"""The options of -o: how they are split, whose they are, and which are refused."""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest

from diffmergefs.cli.mountoptions import (
    REFUSED,
    MountOptions,
    arguments_of,
    sort_options,
    split_options,
    unescaped,
)

OURS = ("page-size", "log", "strict")
CONTEXT = 'context="system_u:object_r:x:s0:c1,c2"'


@pytest.mark.parametrize(
    ("given", "single"),
    [
        (["a,b=1", "c"], ["a", "b=1", "c"]),
        ([",a,,b,"], ["a", "b"]),
        (["log=/x\\,y\\\\,ro"], ["log=/x\\,y\\\\", "ro"]),
        ([f"{CONTEXT},nofail"], [CONTEXT, "nofail"]),
        (['a="1,2",b="3,4"'], ['a="1,2"', 'b="3,4"']),
        (['a=x"1,2"y,b'], ['a=x"1,2"y', "b"]),
        (['a="1,b'], ['a="1', "b"]),  # a quote that does not end is a character
        (["c=\\040\\"], ["c=\\040\\"]),
        (["a=1\n2,b"], ["a=1\n2", "b"]),
    ],
)
def test_options_are_split_at_commas(given: list[str], single: list[str]) -> None:
    assert split_options(given) == single


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("log=/x\\,y", "/x,y"),
        ("log=/x\\\\", "/x\\"),
        ('log="/x,y"', "/x,y"),
        ('log=\\"x\\"', '"x"'),
        ('log=x"1,2"y', 'x"1,2"y'),
        ("log=", ""),
        ("log", None),
    ],
)
def test_our_own_options_have_their_values_as_they_are_meant(
    option: str, value: str | None
) -> None:
    assert sort_options([option], OURS) == MountOptions([("log", value)], [])


def test_underscores_and_hyphens_are_the_same_in_our_names() -> None:
    found = sort_options(["page_size=8192,page-size=4096,strict"], OURS)
    assert arguments_of(found.ours) == ["--page-size=8192", "--page-size=4096", "--strict"]


def test_libfuse_gets_what_it_knows(capfd: pytest.CaptureFixture[str]) -> None:
    given = "noatime,ro,auto_unmount,nosymfollow,nofail,_netdev,x-systemd.automount,user=eve"
    found = sort_options([given], OURS)
    assert found == MountOptions([], ["noatime", "auto_unmount", "nosymfollow"])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("is_there", [True, False])
def test_contexts_are_for_kernels_with_selinux(
    is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exists = os.path.exists
    monkeypatch.setattr(
        os.path, "exists", lambda path: is_there if "selinux" in str(path) else exists(path)
    )
    found = sort_options([f"{CONTEXT},fscontext=a\\,b"], OURS)
    assert found == MountOptions([], [CONTEXT, "fscontext=a\\,b"] if is_there else [])
    assert [unescaped(option) for option in found.libfuse[1:]] == ["fscontext=a,b"][:is_there]


@pytest.mark.parametrize("option", ["uid=1000", "gid=100", "umask=022", "fmask=0133"])
def test_what_a_view_cannot_promise_is_said(option: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert sort_options([option], OURS) == MountOptions([], [])
    assert capfd.readouterr().err.startswith(f"diffmergefs: -o {option}: has no effect: ")


@pytest.mark.parametrize("name", [*REFUSED, "nonsense", "stric", "X"])
def test_other_options_are_refused_by_name(name: str) -> None:
    reason = REFUSED.get(name, "unknown option")
    for option in (name, f"{name}=1"):
        with pytest.raises(click.UsageError) as caught:
            sort_options(["noatime", option], OURS)
        assert caught.value.message.startswith(f"-o {option}: {reason}")


def test_a_caller_may_refuse_more_ignore_more_and_hear_of_unknown_ones() -> None:
    unknown: list[str] = []
    assert sort_options(
        ["rw,huh=1,strict"], OURS, ignored=("rw",), unknown=unknown.append
    ) == MountOptions([("strict", None)], [])
    assert unknown == ["huh=1"]
    with pytest.raises(click.UsageError, match="-o page_size=1: not today"):
        sort_options(["page_size=1"], OURS, refused={"page-size": "not today"})
