"""The help of each verb, and the line that a wrong call gets."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from diffmergefs import cli
from diffmergefs.cli.options import EXPERT
from diffmergefs.cli.usage import (
    ARGUMENTS,
    Verb,
    argument_names,
    did_you_mean,
    error_line,
    usage_line,
    with_step,
)
from diffmergefs.cli.verbs import TABLE, load
from diffmergefs.core.errors import FileAccessError, NoSpaceError

VERBS = {name: verb for name in TABLE if isinstance(verb := load(name), Verb)}


def help_of(verb: click.Command) -> str:
    # click keeps the help option that it makes first.
    parent = click.Context(cli.cli, info_name="diffmergefs", help_option_names=["-h", "--help"])
    return verb.get_help(click.Context(verb, parent, verb.name))


def sections(verb: click.Command) -> dict[str, str]:
    parts = re.split(r"^(Arguments|Options|Expert):$", help_of(verb), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_all_verbs_with_options_explain_themselves() -> None:
    assert TABLE.keys() - VERBS.keys() == {"completion"}


@pytest.mark.parametrize("name", VERBS)
def test_a_verbs_own_options_stand_before_those_for_experts(name: str) -> None:
    found = sections(VERBS[name])
    assert [*found] == [part for part in ("Arguments", "Options", "Expert") if part in found]
    for param in VERBS[name].params:
        if isinstance(param, click.Option):
            part = "Expert" if param.name in EXPERT else "Options"
            assert re.search(rf"^  .*{param.opts[0]}\b", found[part], re.MULTILINE), param.opts


def test_each_option_for_experts_exists() -> None:
    assert {param.name for verb in VERBS.values() for param in verb.params} >= EXPERT


@pytest.mark.parametrize("name", VERBS)
def test_image_and_source_are_explained_wherever_they_are_taken(name: str) -> None:
    for word in ARGUMENTS:
        told = re.search(rf"^  {word}  ", sections(VERBS[name]).get("Arguments", ""), re.MULTILINE)
        assert (told is not None) == (word in argument_names(VERBS[name])), word


def test_image_is_taken_by_what_reads_an_image() -> None:
    taking = {name for name, verb in VERBS.items() if "IMAGE" in argument_names(verb)}
    assert taking >= {"info", "map", "flatten", "squash", "prefetch"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lst", "did you mean list?"),
        ("unmout", "did you mean unmount?"),
        ("zzz", ""),
    ],
)
def test_what_is_near_is_suggested(name: str, said: str) -> None:
    assert did_you_mean(name, ["list", "umount", "unmount"]) == said


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("went wrong.", "went wrong; see diffmergefs --help"),
        ("went\n\twrong", "went wrong; see diffmergefs --help"),
        ("went wrong; do this", "went wrong; do this"),
    ],
)
def test_a_line_has_one_next_step(text: str, line: str) -> None:
    assert usage_line(click.UsageError(text)) == line


def test_a_line_names_the_verb() -> None:
    verb = VERBS["list"]
    parent = click.Context(cli.cli, info_name="diffmergefs")
    error = click.UsageError("no", click.Context(verb, parent, "list"))
    assert usage_line(error) == "list: no; see diffmergefs list --help"


def test_a_text_has_one_step() -> None:
    assert with_step("wrong", "do this") == "wrong; do this"
    assert with_step("wrong; do that", "do this") == "wrong; do that"
    assert with_step("wrong", "") == "wrong"


@pytest.mark.parametrize(
    ("path", "step"),
    [
        ("{d}/snapshot", "did you mean {d}/snapshots?"),
        ("{d}/snapshots/wrok/", "did you mean {d}/snapshots/work?"),
        ("{d}/snapshot/work", "did you mean {d}/snapshots?"),
        ("{d}/xyz", "check its name"),
        ("{d}/snapshots/work/memory.bin", "check its name"),
        ("near-by", "did you mean nearby?"),
        ("in a store: work", "check its name"),
    ],
)
def test_what_is_near_a_missing_path_is_looked_up(
    path: str, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "snapshots" / "work").mkdir(parents=True)
    (tmp_path / "nearby").touch()
    monkeypatch.chdir(tmp_path)
    named = path.format(d=tmp_path)
    error = FileAccessError(f"{named}: No such file or directory")
    assert error_line(error) == f"{error}; {step.format(d=tmp_path)}"


def test_an_error_without_a_step_gets_what_usually_helps() -> None:
    assert error_line(NoSpaceError("/out: full")) == f"/out: full; {NoSpaceError('').remedy}"
    assert error_line(NoSpaceError("/out: full; remove it")) == "/out: full; remove it"
