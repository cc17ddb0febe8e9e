"""seal on each file system, and the diffs that it refuses."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs import flatten, open_chain, seal_layer
from diffmergefs.core.errors import FileAccessError, NoSpaceError, UntrustedExtentsError
from diffmergefs.core.layer import Layer
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.sidecars import seal
from diffmergefs.writing import sealing
from tests.support import loopfs
from tests.support.commands import diffmergefs_as_nobody, one_line
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.inputs import unchanged
from tests.support.subjects.sealing import DIFF, EXTENTS, SIZE, diff, recorded
from tests.support.users import NOBODY

__all__ = ["diff"]


def test_a_seal_records_the_extents_and_fits_its_file(real_fs: Path) -> None:
    diff = write_layer(real_fs / "diff", SIZE - 100, [*DIFF, (15 * PAGE, b"end")])
    done: list[int] = []
    with unchanged([diff]):
        result = seal_layer(diff, progress=done.append)
    assert result == sealing.SealResult(
        f"{diff}.bmap", "written", 3, 4 * PAGE - 100, PAGE, overridden=(), hints=()
    )
    assert sum(done) == 4 * PAGE - 100
    assert recorded(diff) == [*EXTENTS, (15 * PAGE, SIZE - 100)]
    stored = seal.find(str(diff))
    assert stored is not None
    seal.compare(Layer.open(str(diff)), stored)
    assert sorted(os.listdir(real_fs)) == ["diff", "diff.bmap"]


@pytest.mark.parametrize(("kind", "check"), [("xfs16k", "grain"), ("tmpfs_huge", "filesystem")])
def test_law_4_comes_first(filesystem: Callable[[str], Path], kind: str, check: str) -> None:
    diff = write_layer(filesystem(kind) / "diff", 4 << 20, [(0, signed(1, 0, PAGE))])
    with pytest.raises(UntrustedExtentsError) as caught:
        seal_layer(diff)
    assert caught.value.check == check
    assert not os.path.exists(f"{diff}.bmap")
    assert seal_layer(diff, policy=TrustPolicy(trust_grain={"all"})).outcome == "written"


def test_a_preallocated_range_is_refused(filesystem: Callable[[str], Path]) -> None:
    path = filesystem("ext4") / "diff"
    write_layer(path, SIZE, DIFF)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 8 * PAGE, PAGE)
    with pytest.raises(UntrustedExtentsError, match="preallocated"):
        seal_layer(path)


def test_flatten_can_seal_what_it_writes(real_fs: Path) -> None:
    base = write_layer(real_fs / "base", SIZE, [(0, signed(0, 0, 2 * PAGE))])
    diff = write_layer(real_fs / "diff", SIZE, DIFF)
    Path(f"{real_fs}/out.bmap").write_text("left over")
    with open_chain(base, [diff]).view as view:
        flatten(view, real_fs / "out", seal=True)
    assert recorded(real_fs / "out") == [(0, 3 * PAGE), (5 * PAGE, 7 * PAGE)]
    with open_chain(real_fs / "out").view as view:
        assert view.layers[0].record(".bmap") is not None
        assert view.read(0, SIZE) == overlay_oracle(SIZE, [[(0, signed(0, 0, 2 * PAGE))], DIFF])


def test_where_nothing_can_be_written(public_path: Path) -> None:
    with loopfs.made("ext4", public_path, 8 << 20) as root:
        pages = [(n * PAGE, signed(1, n * PAGE, PAGE)) for n in range(0, 1000, 2)]
        diff = write_layer(root / "diff", 1000 * PAGE, pages)
        with (root / "full").open("wb") as file, pytest.raises(OSError, match="No space"):
            while True:
                os.write(file.fileno(), bytes(PAGE))
        with pytest.raises(NoSpaceError):
            seal_layer(diff)
        assert not os.path.exists(f"{diff}.bmap")


def test_an_ordinary_user_seals_his_own_and_no_others(public_path: Path) -> None:
    public_path.chmod(0o777)
    theirs = write_layer(public_path / "theirs", SIZE, DIFF)
    theirs.chmod(0o600)
    done = diffmergefs_as_nobody("seal", theirs)
    assert "Permission denied" in one_line(done, FileAccessError.exit_code)
    own = write_layer(public_path / "own", SIZE, DIFF)
    os.chown(own, NOBODY, NOBODY)
    done = diffmergefs_as_nobody("seal", own)
    assert done.returncode == 0, done
    assert os.stat(f"{own}.bmap").st_uid == NOBODY


def test_a_seal_has_the_layers_mode_and_owner(public_path: Path) -> None:
    diff = write_layer(public_path / "diff", SIZE, DIFF)
    os.chown(diff, NOBODY, NOBODY)
    diff.chmod(0o750)
    status = os.stat(seal_layer(diff).path)
    assert (status.st_uid, status.st_gid) == (NOBODY, NOBODY)
    assert stat.S_IMODE(status.st_mode) == 0o640
