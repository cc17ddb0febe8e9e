"""The options that verbs share: what they accept, and what a command gets of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from diffmergefs.cli import options
from diffmergefs.cli.options import (
    MOUNTPOINT,
    PATH,
    OptionalValue,
    Size,
    all_of,
    layer_options,
    layout_options,
    page_size_option,
    state_dir_option,
    store_options,
    strict_option,
    trust_options,
    trust_options_without_records,
    with_values,
)
from diffmergefs.cli.verbs import TABLE, load
from diffmergefs.core.errors import MountTimeoutError
from diffmergefs.opening.trust import CHECKS, TrustPolicy


def given(decorator: Callable[[Any], Any], *arguments: str) -> dict[str, Any]:
    """What a command with these options gets. Raises click.UsageError."""

    @decorator
    def echo(**values: Any) -> dict[str, Any]:
        return values

    command = click.command()(echo)
    found: dict[str, Any] = command.main(with_values(command, arguments), standalone_mode=False)
    return found


everything = all_of(trust_options, strict_option, store_options)


def policy(*arguments: str) -> TrustPolicy:
    (found,) = given(everything, *arguments).values()
    assert isinstance(found, TrustPolicy)
    return found


def test_options_of_trust_become_one_policy(tmp_path: Path) -> None:
    assert policy() == TrustPolicy()
    found = policy(
        *("--trust-grain=grain", "--dense", "--page-size=16384", "--allow-writers", "--no-seal"),
        *("--state-dir", str(tmp_path), "--strict", "--allow-gaps", "--allow-outside", "/a"),
    )
    assert found == TrustPolicy(
        trust_grain={"grain"},
        dense=True,
        page_size=16384,
        allow_writers=True,
        no_seal=True,
        state_dir=str(tmp_path),
        strict=True,
        allow_gaps=True,
        allow_outside=("/a",),
    )


def test_a_command_with_some_of_them_gets_a_policy_and_the_rest_as_they_are() -> None:
    some = all_of(trust_options_without_records, layout_options)
    found = given(some, "--dense", "--suffix=.img", "--layout=numbered")
    assert found == {"policy": TrustPolicy(dense=True), "suffix": ".img", "layout": "numbered"}
    with pytest.raises(click.NoSuchOption, match="--no-seal"):
        given(some, "--no-seal")


def test_layers_keep_their_order() -> None:
    found = given(layer_options, "--diff", "b", "--base", "a", "--diff", "c")
    assert found == {"base": "a", "diffs": ("b", "c")}
    assert given(layer_options) == {"base": None, "diffs": ()}


def test_the_first_decorator_is_the_outermost() -> None:
    def adding(letter: str) -> Callable[[Any], Any]:
        return lambda inner: lambda text: inner(text + letter)

    assert all_of(adding("a"), adding("b"))(lambda text: text)("-") == "-ab"


# Values


@pytest.mark.parametrize("value", ["0", "256", "-4096", "1000", "4097", "3K", "4Q", ""])
def test_a_page_size_is_a_power_of_two(value: str) -> None:
    with pytest.raises(click.BadParameter):
        given(page_size_option, f"--page-size={value}")
    assert given(page_size_option, "--page-size=512") == {"page_size": 512}
    assert given(page_size_option, "--page-size=16K") == {"page_size": 16384}
    assert given(page_size_option) == {"page_size": TrustPolicy.page_size}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("0x1000", 4096),
        ("4K", 4096),
        ("4k", 4096),
        ("4KiB", 4096),
        ("4kb", 4096),
        ("1M", 1 << 20),
        ("16g", 1 << 34),
        ("0x2T", 1 << 41),
    ],
)
def test_a_size_takes_a_unit(text: str, size: int) -> None:
    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "K", "1.5K", "-1", "+1", "4KK", "4P", "٤", "1_0"])
def test_what_is_no_size_is_refused_with_examples(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a size like 4096, 0x1000, 4K or 1M"):
        Size().convert(text, None, None)


@pytest.mark.parametrize(("text", "size"), [("4", 4), ("4K", 4), ("1M", 1024), ("64M", 65536)])
def test_a_plain_size_counts_units(text: str, size: int) -> None:
    assert Size(1024, 4, 65536).convert(text, None, None) == size


@pytest.mark.parametrize("text", ["3", "1K", "65M", "65537", "1G"])
def test_a_size_out_of_range_is_refused_with_the_limits(text: str) -> None:
    with pytest.raises(click.BadParameter, match=f"{text} is .* least 4096 and at most 67108864"):
        Size(1024, 4, 65536).convert(text, None, None)


@pytest.mark.parametrize("names", ["", "grain,", "blocks", "dense", "file system"])
def test_an_unknown_check_is_bad_usage(names: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a check; the checks are filesystem, grai"):
        policy(f"--trust-grain={names}")


def test_checks_may_be_listed_repeated_or_left_out() -> None:
    assert policy().trust_grain == frozenset()
    assert policy("--trust-grain").trust_grain == frozenset(CHECKS)
    assert policy("--trust-grain=all", "--trust-grain=map").trust_grain == frozenset(CHECKS)
    for arguments in (["--trust-grain=grain,map"], ["--trust-grain=grain", "--trust-grain=map"]):
        assert policy(*arguments).trust_grain == {"grain", "map"}


def test_the_shell_is_offered_the_checks() -> None:
    command = click.command()(everything(lambda **_: None))
    (option,) = (param for param in command.params if param.name == "trust_grain")
    offered = option.shell_complete(click.Context(command), "filesystem,co")
    assert [item.value for item in offered] == ["filesystem,copy-up"]


def test_an_option_without_a_value_takes_none_of_the_operands() -> None:
    optional = OptionalValue(["-o", "--opt"], bare="usual")
    command = click.Command("any", params=[optional])
    for arguments, expected in (
        (["--opt", "operand"], ["--opt=usual", "operand"]),
        (["--opt=mine", "operand"], ["--opt=mine", "operand"]),
        (["-o"], ["-o=usual"]),
        (["operand", "--", "--opt"], ["operand", "--", "--opt"]),
        (["--option"], ["--option"]),
    ):
        assert with_values(command, arguments) == expected


# Paths


def commands() -> list[click.Command]:
    found = [load(name) for name in TABLE]
    return [command for command in found if command is not None]


def test_no_argument_is_asked_for_its_attributes_while_it_is_parsed() -> None:
    """As click's own types of paths and files do."""
    types = [param.type for command in commands() for param in command.params]
    paths = [known for known in types if isinstance(known, click.Path | click.File)]
    assert len(paths) > 40
    assert {type(known) for known in paths} == {type(PATH), type(MOUNTPOINT)}


def test_a_path_stays_as_it_is_and_a_directory_becomes_absolute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert given(layer_options, "--base", "../a")["base"] == "../a"
    assert given(state_dir_option, "--state-dir", "../a") == {
        "state_dir": os.path.join(tmp_path.parent, "a")
    }
    with pytest.raises(click.BadParameter, match="an empty path names nothing"):
        given(state_dir_option, "--state-dir", "")


def test_only_a_path_that_a_verb_opens_must_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hang(path: str) -> None:
        asked.append(path)
        raise MountTimeoutError(f"{path}: the daemon has not answered")

    monkeypatch.setattr(options, "require_answer", hang)
    for option, name in (
        (layer_options, "--base"),
        (layer_options, "--diff"),
        (state_dir_option, "--state-dir"),
        (store_options, "--allow-outside"),
    ):
        with pytest.raises(MountTimeoutError):
            given(option, name, "/hung")
    assert asked == ["/hung"] * 4
    take = click.argument("mountpoint", type=MOUNTPOINT)
    assert given(take, "/hung") == {"mountpoint": "/hung"}
