"""`--trust-grain[=NAMES]` on the command line: which checks a user vouches for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs.cli import helper
from diffmergefs.opening.trust import CHECKS
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
