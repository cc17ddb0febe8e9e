"""The help of each verb, and the line that a wrong call gets."""

from __future__ import annotations

import re

import click
import pytest

from diffmergefs import cli
from diffmergefs.cli.options import EXPERT
from diffmergefs.cli.usage import ARGUMENTS, Verb, argument_names, did_you_mean, usage_line
from diffmergefs.cli.verbs import TABLE, load

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
        ("lst", " (did you mean list?)"),
        ("unmout", " (did you mean unmount?)"),
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
