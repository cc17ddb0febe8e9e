"""Parents' recorded hashes under a mount: compared at the first lookup, once, by nobody's leave."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.images import PAGE, overlay_oracle, signed
from tests.support.live import Gate, error_of, note_calls, readers, until
from tests.support.mounts import mounted
from tests.support.stores import BASE_PAGES, SIZE, age, pages, write_tag

REFUSED = "its memory file is not shown"
ABSENT = "ab" * 32


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def image(*layers: int) -> bytes:
    written = [pages(n, [n]) if n else pages(0, BASE_PAGES) for n in layers]
    return overlay_oracle(SIZE, written)


@pytest.fixture
def store(public_path: Path) -> Path:
    """base <- work <- leaf with right hashes, base <- free with none."""
    root = public_path / "store"
    base = write_tag(root, "base") / "memory.bin"
    work = write_tag(root, "work", "base", layer=1, parent_content_hash=sha256(base))
    write_tag(root, "leaf", "work", layer=2, parent_content_hash=sha256(work / "memory.bin"))
    write_tag(root, "free", "base", layer=4)
    return root


@pytest.fixture
def hashed(public_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a line for each file that a daemon has read for a hash."""
    return note_calls(monkeypatch, public_path, "diffmergefs.opening.pins.content_hash")


def test_a_mismatch_breaks_the_tag_and_its_descendants_only(store: Path, mountpoint: Path) -> None:
    wrong = write_tag(store, "wrong", "work", layer=5, parent_content_hash=ABSENT)
    write_tag(store, "below", "wrong", layer=6)
    (wrong / "note").write_text("beside")
    found = sha256(store / "work" / "memory.bin")
    with mounted(store, mountpoint, expect_log=(REFUSED,)) as mount:
        for _ in range(2):
            for tag in ("wrong", "below"):
                assert error_of(mountpoint / tag / "memory.bin") == errno.EIO
                assert "memory.bin" not in os.listdir(mountpoint / tag)
        assert (mountpoint / "wrong" / "note").read_text() == "beside"
        assert (mountpoint / "leaf" / "memory.bin").read_bytes() == image(0, 1, 2)
        lines = [line for line in mount.log().splitlines() if REFUSED in line]
        assert len(lines) == 2
        assert all(found in line and ABSENT in line for line in lines)
        # The tag is healed by its document, without a remount.
        document = wrong / "snapshot.json"
        document.write_text(document.read_text().replace(ABSENT, found))
        age(document)
        until(lambda: error_of(mountpoint / "below" / "memory.bin") is None, "still broken")
        assert (mountpoint / "below" / "memory.bin").read_bytes() == image(0, 1, 5, 6)


def test_without_verify_the_wrong_parent_is_shown_and_the_risk_logged(
    store: Path, mountpoint: Path, hashed: Path
) -> None:
    write_tag(store, "wrong", "work", layer=5, parent_content_hash=ABSENT)
    with mounted(store, mountpoint, "-o", "verify=no", expect_log=("--verify=no",)) as mount:
        assert (mountpoint / "wrong" / "memory.bin").read_bytes() == image(0, 1, 5)
        assert mount.log().count("--verify=no") == 1
    assert hashed.read_text() == ""


def test_another_image_is_served_while_one_is_looked_up_first(
    store: Path, mountpoint: Path, public_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(public_path / "gate")
    log = note_calls(monkeypatch, public_path, "diffmergefs.opening.pins.content_hash", gate)
    work = mountpoint / "work" / "memory.bin"
    with mounted(store, mountpoint), readers(work, gate) as clients:
        gate.wait_until_reached()
        # A look does not hash, and nobody else waits.
        assert (mountpoint / "free" / "memory.bin").read_bytes() == image(0, 4)
        assert (mountpoint / "base" / "memory.bin").read_bytes() == image(0)
        assert all(client.poll() is None for client in clients)
        gate.open()
        assert [client.communicate(timeout=60)[0] for client in clients] == [image(0, 1)] * 8
    assert log.read_text() == "base/memory.bin\n"


def test_a_second_mount_reads_nothing_of_what_the_first_one_verified(
    store: Path, mountpoint: Path, public_path: Path, hashed: Path
) -> None:
    state = f"--state-dir={public_path / 'state'}"
    leaf = mountpoint / "leaf" / "memory.bin"
    with mounted(store, mountpoint, state):
        assert leaf.read_bytes() == image(0, 1, 2)
    assert sorted(hashed.read_text().splitlines()) == ["base/memory.bin", "work/memory.bin"]
    hashed.write_text("")
    with mounted(store, mountpoint, state):
        assert leaf.read_bytes() == image(0, 1, 2)
    assert hashed.read_text() == ""
    with mounted(store, mountpoint, state, "--verify=full"):
        assert leaf.read_bytes() == image(0, 1, 2)
    assert sorted(hashed.read_text().splitlines()) == ["base/memory.bin", "work/memory.bin"]


def test_verify_spares_the_mount_the_hash(
    store: Path, mountpoint: Path, public_path: Path, hashed: Path
) -> None:
    state = f"--state-dir={public_path / 'state'}"
    command = [sys.executable, "-m", "diffmergefs", "verify", state, str(store / "leaf")]
    subprocess.run(command, check=True, timeout=60, stdout=subprocess.DEVNULL)
    hashed.write_text("")
    with mounted(store, mountpoint, state):
        assert (mountpoint / "leaf" / "memory.bin").read_bytes() == image(0, 1, 2)
    assert hashed.read_text() == ""


def test_a_parent_replaced_between_mounts_is_noticed(
    store: Path, mountpoint: Path, public_path: Path
) -> None:
    state = f"--state-dir={public_path / 'state'}"
    leaf = mountpoint / "leaf" / "memory.bin"
    with mounted(store, mountpoint, state):
        assert leaf.read_bytes() == image(0, 1, 2)
    base = store / "base" / "memory.bin"
    with base.open("r+b") as file:
        file.write(signed(9, 0, PAGE))
    age(base)  # as old, as large and the same file: only its ctime tells
    with mounted(store, mountpoint, state, expect_log=(REFUSED,)) as mount:
        assert error_of(leaf) == errno.EIO
        assert sha256(base) in mount.log()


def test_a_planted_memory_is_not_believed(store: Path, mountpoint: Path, public_path: Path) -> None:
    state = public_path / "state"
    with mounted(store, mountpoint, f"--state-dir={state}"):
        (mountpoint / "leaf" / "memory.bin").read_bytes()
    state.chmod(0o777)
    told = f"{state}: others may write to it"
    with mounted(store, mountpoint, f"--state-dir={state}", expect_log=(told,)) as mount:
        assert (mountpoint / "leaf" / "memory.bin").read_bytes() == image(0, 1, 2)
        assert mount.log().count(told) == 1


def test_in_the_background_a_relative_directory_is_the_callers(
    store: Path, mountpoint: Path, public_path: Path
) -> None:
    command = [sys.executable, "-m", "diffmergefs", "mount", "--log", "log", "-o"]
    command += ["state_dir=state,verify=pins", str(store), str(mountpoint)]
    subprocess.run(command, check=True, timeout=60, cwd=public_path)
    try:
        assert (mountpoint / "leaf" / "memory.bin").read_bytes() == image(0, 1, 2)
    finally:
        subprocess.run([*command[:3], "umount", str(mountpoint)], check=True, timeout=60)
    assert [path.suffix for path in (public_path / "state").iterdir()] == [".sqlite3"]
