"""Who may connect: whoever may read each layer, and nobody else (law 9)."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tests.support import skips
from tests.support.commands import mistake
from tests.support.images import PAGE, write_layer
from tests.support.pageservers import serving
from tests.support.users import NOBODY
from tests.support.vmm import Vmm
from tests.unit.uffd.conftest import BASE, DIFF, ORACLE, SIZE

_UID = 1234
_REFUSED = ("may not read", "it hangs")


@pytest.fixture
def options(public_path: Path) -> list[str | Path]:
    skips.require_root()
    base = write_layer(public_path / "base", SIZE, BASE)
    return ["--base", base, "--diff", write_layer(public_path / "diff", SIZE, DIFF)]


def test_the_socket_is_for_its_owner(options: list[str | Path], public_path: Path) -> None:
    path = public_path / "socket"
    with serving(path, *options, "--socket-owner", str(_UID)) as server:
        status = path.stat()
        assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (_UID, 0o600)
        with Vmm(SIZE, user=_UID) as vmm:
            vmm.connect(path)
            assert vmm.read(0, SIZE) == ORACLE
        with Vmm(SIZE, user=NOBODY) as other, pytest.raises(AssertionError):
            other.connect(path)
        assert f"of user {_UID}: connected" in server.log()
    with serving(path, *options, "--socket-owner", f"root:{_UID}"):
        status = path.stat()
        assert (status.st_gid, stat.S_IMODE(status.st_mode)) == (_UID, 0o660)


@pytest.mark.parametrize("name", ["base", "diff", "."])
def test_no_socket_lets_anybody_read_what_its_layers_do_not(
    options: list[str | Path], public_path: Path, tmp_path: Path, name: str
) -> None:
    tmp_path.chmod(0o755)
    for folder in (tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)
    (public_path / name).chmod(0o700)
    path = tmp_path / "socket"
    with serving(path, *options, expect_log=_REFUSED) as server:
        path.chmod(0o666)
        with Vmm(SIZE, user=_UID) as vmm:
            vmm.connect(path)
            assert vmm.is_closed()
        server.wait_for(f"of user {_UID} may not read {public_path}")
        with Vmm(SIZE) as vmm:
            vmm.connect(path)
            assert vmm.read(0, PAGE) == ORACLE[:PAGE]


def test_an_owner_that_does_not_exist_is_a_usage_error(options: list[str | Path]) -> None:
    mistake(2, "uffd", *options, "--socket", "x", "--socket-owner", "no-such-user")
