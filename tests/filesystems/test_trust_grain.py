"""`--trust-grain[=NAMES]` on the command line: which checks a user vouches for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import pytest

from diffmergefs import cli
from diffmergefs.cli import helper
from diffmergefs.cli.mount import complete_options, mount
from diffmergefs.opening.trust import CHECKS, TrustPolicy
from tests.support import mounts
from tests.support.commands import diffmergefs, mistake
from tests.support.images import PAGE, overlay_oracle, signed, write_layer

SIZE = 16 * PAGE
BASE = [(0, signed(0, 0, SIZE))]
DIFF = [(3 * PAGE, signed(1, 3 * PAGE, PAGE))]


@pytest.fixture
def layers(filesystem: Callable[[str], Path]) -> list[str]:
    """Of a chain whose diff its filesystem's type refuses, and nothing else."""
    place = filesystem("tmpfs_advise")
    base, diff = write_layer(place / "base", SIZE, BASE), write_layer(place / "diff", SIZE, DIFF)
    return [f"--base={base}", f"--diff={diff}"]


@pytest.mark.parametrize(
    "names", ["", "=all", "=filesystem", "=filesystem,copy-up", "=copy-up,filesystem"]
)
def test_the_checks_that_are_named_are_overridden(
    names: str, layers: list[str], tmp_path: Path
) -> None:
    done = diffmergefs("flatten", f"--trust-grain{names}", *layers, "-o", tmp_path / "out")
    assert done.returncode == 0
    assert done.stderr.startswith("diffmergefs: --trust-grain overrides the check of filesystem: ")
    assert (tmp_path / "out").read_bytes() == overlay_oracle(SIZE, [BASE, DIFF])


def test_no_other_check_is_overridden(layers: list[str], tmp_path: Path) -> None:
    others = ",".join(name for name in CHECKS if name != "filesystem")
    for given in ([], [f"--trust-grain={others}"]):
        line = mistake(5, "flatten", *given, *layers, "-o", tmp_path / "out")
        assert "--trust-grain=filesystem" in line


@pytest.mark.parametrize("verb", ["info", "flatten", "map", "verify", "list", "mount"])
@pytest.mark.parametrize("names", ["", "grain,", "blocks", "dense", "file system"])
def test_an_unknown_name_is_bad_usage(verb: str, names: str, tmp_path: Path) -> None:
    done = diffmergefs(verb, f"--trust-grain={names}", tmp_path)
    assert done.returncode == 2
    assert "is not a check; the checks are filesystem, grain, " in done.stderr


def test_what_follows_it_without_a_name_is_an_operand(tmp_path: Path) -> None:
    line = mistake(14, "info", "--trust-grain", tmp_path / "gone")
    assert f"{tmp_path}/gone: No such file" in line
    line = mistake(14, "info", "--", "--trust-grain")
    assert "--trust-grain: No such file" in line


def context(*arguments: str) -> click.Context:
    given = ["source", "mountpoint", *arguments]
    return mount.make_context("mount", given, **cli.cli.context_settings)


def policy_of(*arguments: str) -> TrustPolicy:
    return TrustPolicy(trust_grain=context(*arguments).params["trust_grain"])


def test_it_may_be_repeated_also_as_a_mount_option() -> None:
    assert policy_of().trust_grain == frozenset()
    every = policy_of("--trust-grain").trust_grain
    assert every == policy_of("-o", "trust_grain").trust_grain == frozenset(CHECKS)
    for arguments in (
        ("--trust-grain=grain", "--trust-grain=copy-up"),
        ("-o", "trust_grain=grain,trust_grain=copy-up"),
        ("-o", "trust-grain=grain\\,copy-up"),
        ("--trust-grain=grain", "-o", "ro,trust_grain=copy-up,dense"),
    ):
        assert policy_of(*arguments).trust_grain == {"grain", "copy-up"}


def test_the_helper_of_mount_takes_it_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = [str(tmp_path), "/mnt", "-f", "-o"]
    assert helper.main([*fake, "rw,trust_grain=filesystem,trust_grain=copy-up"]) == 0
    assert helper.main([*fake, "rw,trust_grain"]) == 0
    assert helper.main([*fake, "rw,trust_grain=nothing"]) == 1
    assert "'nothing' is not a check" in capsys.readouterr().err


def test_a_mount_goes_by_its_mount_options(layers: list[str], mountpoint: Path) -> None:
    log = "--log=/dev/null"
    mistake(5, "mount", log, "-o", "trust_grain=copy-up", *layers, mountpoint)
    told = ("check of filesystem",)
    options = ("-o", "trust_grain=copy-up,trust_grain=filesystem", *layers)
    with mounts.mounted(None, mountpoint, *options, expect_log=told):
        assert (mountpoint / "base").read_bytes() == overlay_oracle(SIZE, [BASE, DIFF])


def test_the_shell_is_offered_the_names() -> None:
    (option,) = [p for p in mount.params if p.name == "trust_grain"]
    offered = [item.value for item in option.shell_complete(context(), "filesystem,co")]
    assert offered == ["filesystem,copy-up"]
    assert complete_options(context(), option, "dense,trust") == [
        "dense,trust_grain",
        "dense,trust_grain=",
    ]
