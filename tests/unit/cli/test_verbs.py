"""The table of verbs: every target exists, every command is in it, and the help has its groups."""

from __future__ import annotations

import importlib
import pkgutil
import re

import click
import pytest

from diffmergefs import cli
from diffmergefs.cli.verbs import ALIASES, TABLE, load


@pytest.mark.parametrize("name", sorted(TABLE))
def test_each_verb_of_the_table_exists(name: str) -> None:
    entry = TABLE[name]
    command = getattr(importlib.import_module(f"diffmergefs.cli.{entry.module}"), entry.command)
    assert isinstance(command, click.Command)
    assert load(name) is command and command.name == name


def test_the_table_has_every_command_but_the_mount_helper() -> None:
    names = [module.name for module in pkgutil.iter_modules(cli.__path__)]
    modules = [importlib.import_module(f"diffmergefs.cli.{name}") for name in names]
    values = [value for module in modules for value in vars(module).values()]
    commands = {value.name for value in values if isinstance(value, click.Command)}
    assert commands - {"mount.fuse.diffmergefs"} == set(TABLE)


def test_an_unknown_verb_is_none() -> None:
    assert load("nonsense") is None


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_is_the_same_command(alias: str) -> None:
    assert load(alias) is load(ALIASES[alias]) is not None


def test_the_help_has_a_whole_line_for_each_verb_by_group() -> None:
    names = ["-h", "--help"]
    context = click.Context(cli.cli, info_name="x", terminal_width=80, help_option_names=names)
    text = cli.cli.get_help(context)
    for name, entry in TABLE.items():
        assert f"\n  {name:{max(map(len, TABLE))}}  {entry.summary}\n" in f"{text}\n"
    headings = re.findall(r"^(\w+):$", text, re.MULTILINE)
    assert headings == ["Options", *dict.fromkeys(entry.group for entry in TABLE.values())]
    assert headings[1:5] == ["Look", "Serve", "Write", "Check"]
