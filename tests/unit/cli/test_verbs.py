"""The table of verbs: every target exists, and every command is in it."""

from __future__ import annotations

import importlib
import pkgutil

import click
import pytest

from diffmergefs import cli
from diffmergefs.cli.verbs import TABLE, load


@pytest.mark.parametrize("name", sorted(TABLE))
def test_each_verb_of_the_table_exists(name: str) -> None:
    module, attribute = TABLE[name]
    command = getattr(importlib.import_module(f"diffmergefs.cli.{module}"), attribute)
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
