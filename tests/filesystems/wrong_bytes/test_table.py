"""Every row of the table, by `info`, `flatten` and `mount`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs.core.errors import DenseDiffError, DiffMergeError, UntrustedExtentsError
from diffmergefs.opening.images import open_chain
from diffmergefs.opening.trust import TrustPolicy
from tests.filesystems.wrong_bytes.diffs import SIZE, Extents, scattered_pages
from tests.filesystems.wrong_bytes.places import Place
from tests.filesystems.wrong_bytes.table import BASES, RIGHT, TABLE, Row
from tests.support import mounts, mounttable
from tests.support.commands import diffmergefs, mistake
from tests.support.images import overlay_oracle, signed, write_layer

BASE = [(0, signed(0, 0, SIZE))]


def require_right(
    layers: list[str], oracle: bytes | bytearray, out: Path, mountpoint: Path, *options: str
) -> None:
    """`flatten` and a mount show these very bytes."""
    done = diffmergefs("flatten", *options, *layers, "-o", out)
    assert done.returncode == 0, done
    assert out.read_bytes() == oracle
    with mounts.mounted(None, mountpoint, *options, *layers):
        (shown,) = (path for path in mountpoint.iterdir() if path.is_file())
        assert shown.read_bytes() == oracle


def refusal(policy: TrustPolicy, base: str, *diffs: str) -> DiffMergeError:
    """The error with which they are refused; none of them stays open."""
    try:
        open_chain(base, diffs, policy)
    except DiffMergeError as error:
        return error.anew()
    raise AssertionError(f"{diffs}: not refused")


def require_refused(layers: list[str], row: Row, out: Path, mountpoint: Path) -> None:
    """By this check, and nothing is shown."""
    policy = TrustPolicy(strict="--strict" in row.options)
    error = refusal(policy, *(layer.partition("=")[2] for layer in layers))
    if row.must == "dense":
        assert isinstance(error, DenseDiffError)
    else:
        assert isinstance(error, UntrustedExtentsError) and error.check == row.must
    for command in (["info"], ["flatten", "-o", out], ["mount", "--log=/dev/null", mountpoint]):
        mistake(error.exit_code, *command, *row.options, *layers)
    assert not out.exists() and not mounttable.at(str(mountpoint))


@pytest.mark.parametrize("row", TABLE, ids=[row.name for row in TABLE])
def test_a_diff_is_right_or_refused(
    row: Row, filesystem: Callable[[str], Path], tmp_path: Path, mountpoint: Path
) -> None:
    base = write_layer(tmp_path / "base", SIZE, BASE)
    written: list[Extents] = []

    def fill(directory: Path) -> None:
        written.append(row.written(directory / "diff"))

    with row.place.filled(filesystem, fill) as directory:
        diff = directory / "diff"
        written.append(row.later(diff))
        layers = [f"--base={base}", f"--diff={diff}"]
        with row.meanwhile(diff):
            if row.must != RIGHT:
                require_refused(layers, row, tmp_path / "out", mountpoint)
                return
            done = diffmergefs("info", "--json", *row.options, *layers)
            assert done.returncode == 0, done
            assert json.loads(done.stdout)["layers"][1]["trust"] == "trusted"
            oracle = overlay_oracle(SIZE, [BASE, *written])
            require_right(layers, oracle, tmp_path / "out", mountpoint, *row.options)


@pytest.mark.parametrize("place", BASES, ids=[place.name for place in BASES])
def test_a_base_reads_right_anywhere(
    place: Place, filesystem: Callable[[str], Path], tmp_path: Path, mountpoint: Path
) -> None:
    base = [(0, signed(0, 0, SIZE // 2)), (SIZE // 2, bytes(SIZE // 4))]  # and a hole at the end
    written = scattered_pages(tmp_path / "diff")
    with place.filled(filesystem, lambda d: void(write_layer(d / "base", SIZE, base))) as directory:
        layers = [f"--base={directory / 'base'}", f"--diff={tmp_path / 'diff'}"]
        oracle = overlay_oracle(SIZE, [base, written])
        require_right(layers, oracle, tmp_path / "out", mountpoint)


def void(value: object) -> None:
    """For a function that is to return nothing."""
