"""The tests' own helpers do what they say."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import images, inputs, isolation, loopfs, mounts, mounttable, skips, users
from tests.support.places import REPOSITORY


def test_signed_bytes_name_their_layer_and_offset() -> None:
    assert images.signed(5, 0x12345670, 32) == b"005:00001234567000" + b"5:000012345680"
    assert images.signed(0, 0, 16) == b"000:000000000000"
    assert images.signed(7, 4096, 0) == b""


@given(
    layer=st.integers(0, 0xFFF),
    offset=st.integers(0, (1 << 48) - 20000),
    length=st.integers(0, 10000),
)
def test_signed_bytes_do_not_depend_on_where_the_range_starts(
    layer: int, offset: int, length: int
) -> None:
    start = offset - offset % 16
    cells = range(start, offset + length, 16)
    expected = b"".join(f"{layer:03x}:{cell:012x}".encode() for cell in cells)
    signed = images.signed(layer, offset, length)
    assert signed == expected[offset - start :][:length]
    assert len(signed) == length
    assert 0 not in signed


@pytest.mark.parametrize(("layer", "offset"), [(-1, 0), (0x1000, 0), (0, -1), (0, 1 << 48)])
def test_signed_refuses_what_its_digits_cannot_hold(layer: int, offset: int) -> None:
    with pytest.raises(ValueError, match="not in"):
        images.signed(layer, offset, 1)


def test_a_written_layer_reads_as_the_oracle_says(real_fs: Path) -> None:
    extents = [
        (4096, images.signed(1, 4096, 8192)),
        (8000, images.signed(2, 8000, 10)),
        (1 << 20, images.signed(1, 1 << 20, 100)),
    ]
    size = 4 << 20
    path = images.write_layer(real_fs / "layer", size, extents)
    assert path.read_bytes() == images.overlay_oracle(size, [extents])
    assert path.stat().st_blocks * 512 < size // 2


def test_the_oracle_lays_later_layers_over_earlier_ones() -> None:
    layers = [[(0, b"aaaa"), (1, b"bb")], [(3, b"cc")]]
    assert images.overlay_oracle(6, layers) == b"abbcc\0"
    with pytest.raises(ValueError, match="outside"):
        images.overlay_oracle(4, layers)


def test_unchanged_sees_new_content_behind_old_times(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    status = path.stat()
    with inputs.unchanged([path]):
        path.read_bytes()
    with pytest.raises(AssertionError, match="changed"), inputs.unchanged([path]):
        path.write_bytes(b"new")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs", "xfs16k", "tmpfs_huge"])
def test_a_file_system_is_of_the_kind_that_was_asked_for(
    kind: str, filesystem: Callable[[str], Path]
) -> None:
    path = filesystem(kind)
    (entry,) = mounttable.at(os.path.realpath(path.parent))
    assert entry.fstype == kind.removesuffix("16k").removesuffix("_huge")
    assert list(path.iterdir()) == []
    assert filesystem(kind) != path


def test_xfs16k_has_blocks_of_16_kib(filesystem: Callable[[str], Path]) -> None:
    path = images.write_layer(filesystem("xfs16k") / "file", 1 << 20, [(0, b"x")])
    assert path.stat().st_blksize == 16384
    assert path.stat().st_blocks * 512 == 16384


def test_an_overlay_copies_up(overlay_fs: loopfs.Overlay) -> None:
    (overlay_fs.lower / "file").write_bytes(b"below")
    merged = overlay_fs.merged / "file"
    assert merged.read_bytes() == b"below"
    merged.write_bytes(b"above")
    assert (overlay_fs.lower / "file").read_bytes() == b"below"
    assert (overlay_fs.upper / "file").read_bytes() == b"above"


def test_a_file_system_is_gone_after_a_failure_that_keeps_it_busy(public_path: Path) -> None:
    held = -1
    with pytest.raises(ZeroDivisionError), loopfs.made("ext4", public_path) as root:
        held = os.open(root / "open", os.O_CREAT | os.O_WRONLY)
        raise ZeroDivisionError
    assert list(public_path.iterdir()) == []
    os.close(held)
    deadline = time.monotonic() + 10
    while str(public_path) in _loop_devices():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _loop_devices() -> str:
    return subprocess.run(["losetup", "--list"], capture_output=True, text=True, check=True).stdout


def test_mount_paths_with_blanks_are_found(public_path: Path) -> None:
    skips.require_mounts()
    path = public_path / "a b\\c\nd"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(path)], check=True)
    assert [entry.fstype for entry in mounttable.at(str(path))] == ["tmpfs"]
    mounttable.unmount_below(str(public_path))
    assert mounttable.at(str(path)) == []


@pytest.mark.parametrize("uid", [users.NOBODY, users.STRANGER])
def test_run_as_is_nobody_but_that_user(uid: int, public_path: Path) -> None:
    result = users.run_as(uid, uid, ["/usr/bin/id", "-u"], text=True)
    assert result.stdout.strip() == str(uid)
    result = users.run_as(uid, uid, ["/usr/bin/id", "-G"], text=True)
    assert result.stdout.strip() == str(uid)
    secret = public_path / "secret"
    secret.touch(mode=0o600)
    assert users.run_as(uid, uid, ["/bin/cat", str(secret)]).returncode == 1
    secret.chmod(0o644)
    assert users.run_as(uid, uid, ["/bin/cat", str(secret)]).returncode == 0


def test_complaints_are_found_unless_they_were_expected() -> None:
    log = (
        "2024-01-01 00:00:00,000 INFO a: ready\n"
        "2024-01-01 00:00:00,000 WARNING a: odd layer\n"
        "Traceback (most recent call last):\n"
    )
    assert len(mounts.complaints_in(log)) == 2
    assert mounts.complaints_in(log, ("odd", "Traceback")) == []


@pytest.mark.parametrize(
    ("where", "skip"),
    [
        ("module", "pytest.skip('why not', allow_module_level=True)"),
        ("test", "def test_it():\n    pytest.skip('why not')"),
        ("mark", "@pytest.mark.skip(reason='why not')\ndef test_it():\n    pass"),
    ],
)
@pytest.mark.parametrize("ci", ["true", ""])
def test_a_skip_is_a_failure_in_ci(where: str, skip: str, ci: str, tmp_path: Path) -> None:
    (tmp_path / f"test_{where}.py").write_text(f"import pytest\n{skip}\n")
    output = _pytest(tmp_path, ci)
    assert "why not" in output.stdout
    assert ("reason that is not allowed" in output.stdout) is bool(ci)
    assert (output.returncode in (1, 2)) is bool(ci)


def test_an_expected_failure_is_no_skip(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n@pytest.mark.xfail\ndef test_it():\n    assert False\n"
    )
    assert _pytest(tmp_path, "true").returncode == 0


def _pytest(directory: Path, ci: str) -> subprocess.CompletedProcess[str]:
    """Run pytest on the directory, with the hooks that make skips failures."""
    root = REPOSITORY
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-ra", "-p", "tests.support.strict_skips", "."],
        cwd=directory,
        env=os.environ | {"CI": ci, "PYTHONPATH": str(root), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )


ISOLATED = """
import subprocess, sys
from tests.support import isolation, mounttable
folder = sys.argv[1]
assert isolation.enter_own_mounts()
theirs = [entry.path for entry in mounttable.entries() if entry.path.startswith(folder)]
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", f"{folder}/ours"], check=True)
print(theirs, len(mounttable.at(f"{folder}/ours")), flush=True)
sys.stdin.read()
"""


def test_sessions_do_not_see_each_others_mounts(public_path: Path) -> None:
    skips.require_mounts()
    theirs, ours = public_path / "theirs", public_path / "ours"
    theirs.mkdir()
    ours.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", theirs], check=True)
    process = subprocess.Popen(
        [sys.executable, "-c", ISOLATED, str(public_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "[] 1\n"
        assert mounttable.at(str(ours)) == [] and len(mounttable.at(str(theirs))) == 1
    finally:
        process.communicate(timeout=60)
        mounttable.unmount(str(theirs))


def test_files_lie_on_a_disk_though_tmp_is_in_memory(
    tmp_path: Path, filesystem: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, disk = str(filesystem("tmpfs")), str(filesystem("ext4"))
    for temporary, chosen, there, expected in [
        (memory, None, disk, disk),
        (disk, None, str(tmp_path), disk),
        (memory, memory, disk, memory),
        (memory, None, memory, memory),
        (memory, None, f"{disk}/missing", memory),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "tempdir", temporary)
            patch.delenv("TMPDIR", raising=False)
            if chosen:
                patch.setenv("TMPDIR", chosen)
            isolation.keep_files_on_disk(there)
            assert tempfile.gettempdir() == expected
            assert os.environ.get("TMPDIR", temporary) == expected
