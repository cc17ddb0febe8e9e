"""The disk fills up while an image is written: one line, no output, inputs untouched."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import loopfs
from tests.support.commands import diffmergefs, mistake, one_line, succeed
from tests.support.images import overlay_oracle, signed, write_layer
from tests.support.inputs import unchanged
from tests.support.live import Gate

NO_SPACE = 9
MIB = 1 << 20
SIZE = 32 * MIB
CHAIN = [
    [(0, signed(0, 0, 24 * MIB))],
    [(n * MIB, signed(1, n * MIB, MIB)) for n in range(0, 32, 2)],
]
ORACLE = overlay_oracle(SIZE, CHAIN)
#: What each can be made with; all are small enough to be filled quickly.
SIZES = {"ext4": 96 * MIB, "xfs": 300 * MIB, "btrfs": 160 * MIB}


@pytest.fixture
def layers(tmp_path: Path) -> Iterator[list[Path]]:
    """A base and a diff, on another filesystem than the one that fills up."""
    found = [write_layer(tmp_path / f"{n}", SIZE, extents) for n, extents in enumerate(CHAIN)]
    with unchanged(found):
        yield found


@pytest.fixture(params=list(SIZES))
def small(request: pytest.FixtureRequest, public_path: Path) -> Iterator[Path]:
    """A directory on a small filesystem."""
    with loopfs.made(request.param, public_path, SIZES[request.param]) as root:
        (root / "out").mkdir()
        yield root / "out"


def free(directory: Path) -> int:
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def fill(directory: Path, leave: int = 0, stop: threading.Event | None = None) -> None:
    """Eat the space of the filesystem, until so many bytes are left or none is to be had."""
    with (directory.parent / "filler").open("ab", buffering=0) as file:
        step = MIB
        while step >= 4096 and not (stop and stop.is_set()):
            length = min(step, free(directory) - leave) if leave else step
            if length < 4096:
                break
            try:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), length)
            except OSError:
                step //= 4
        os.fsync(file.fileno())


def unfill(directory: Path) -> None:
    (directory.parent / "filler").unlink(missing_ok=True)
    # What was freed can be used once the filesystem has committed it.
    os.sync()


def flatten_command(layers: list[Path], out: Path) -> list[str]:
    return ["flatten", "--base", str(layers[0]), "--diff", str(layers[1]), "-o", str(out)]


def test_less_is_free_than_needed(small: Path, layers: list[Path]) -> None:
    """`flatten` asks first, and names both numbers."""
    fill(small, leave=8 * MIB)
    line = mistake(NO_SPACE, *flatten_command(layers, small / "image"))
    assert "bytes must be written, but" in line and str(small / "image") in line
    assert os.listdir(small) == []


def test_a_filler_between_the_question_and_the_copy(
    small: Path,
    layers: list[Path],
    public_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The space was there when `flatten` asked, and is gone when it writes."""
    gate = Gate(public_path / "gate")
    code = (
        "from diffmergefs.writing import flatten\n"
        "ask = flatten.require_space\n"
        "def asked(target, needed):\n"
        "    ask(target, needed)\n"
        "    wait_at_gate()\n"
        "flatten.require_space = asked\n"
    )
    with monkeypatch.context() as patch:
        gate.patch(patch, code)
        command = [sys.executable, "-m", "diffmergefs", *flatten_command(layers, small / "image")]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    try:
        gate.wait_until_reached()
        fill(small)
        gate.open()
        out, err = process.communicate(timeout=60)
    finally:
        gate.open()
        process.kill()
        process.communicate()
    one_line(subprocess.CompletedProcess(command, process.returncode, out, err), NO_SPACE)
    assert f"{small / 'image'}: No space left on device while writing" in err
    assert os.listdir(small) == []
    unfill(small)
    succeed(*flatten_command(layers, small / "image"))
    assert (small / "image").read_bytes() == ORACLE


def test_a_filler_at_any_moment(
    small: Path, layers: list[Path], count: Callable[[int], int], seen: Callable[..., None]
) -> None:
    """Whichever of the two gets the last block: the whole image, or none and status 9."""
    outcomes: Counter[str] = Counter()
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    for _ in range(count(20)):
        # Enough for the image when it is asked for; the filler begins at a random moment.
        fill(small, leave=SIZE + 8 * MIB)
        stop = threading.Event()
        filler = threading.Timer(dice.random() * 0.6, fill, (small, 0, stop))
        filler.start()
        try:
            done = diffmergefs(*flatten_command(layers, small / "image"))
        finally:
            stop.set()
            filler.join()
        if done.returncode == 0:
            assert (small / "image").read_bytes() == ORACLE
            assert os.listdir(small) == ["image"]
            (small / "image").unlink()
            outcomes["whole"] += 1
        else:
            assert "free" in one_line(done, NO_SPACE)
            assert os.listdir(small) == []
            outcomes["refused"] += 1
        unfill(small)
    seen(runs=sum(outcomes.values()), outcomes=outcomes)


def test_apply_into_a_full_filesystem(small: Path, layers: list[Path]) -> None:
    """`apply` ends with status 9, the diff untouched, and can be repeated once there is room."""
    base = write_layer(small / "base", SIZE, [])
    fill(small)
    line = mistake(NO_SPACE, "apply", layers[1], base)
    assert f"{base}: No space left on device while writing" in line
    assert base.stat().st_size == SIZE
    assert os.listdir(small) == ["base"]
    unfill(small)
    assert succeed("apply", layers[1], base) == f"{16 * MIB} bytes (16 MiB) copied\n"
    assert base.read_bytes() == overlay_oracle(SIZE, CHAIN[1:])


def test_a_quota_is_used_up(public_path: Path, layers: list[Path]) -> None:
    """A quota is met while writing: the filesystem has space enough, who writes has not."""
    with loopfs.made("btrfs", public_path, SIZES["btrfs"]) as root:
        run("btrfs", "quota", "enable", root)
        run("btrfs", "subvolume", "create", root / "limited")
        run("btrfs", "qgroup", "limit", "16M", root / "limited")
        assert free(root / "limited") > SIZE
        line = mistake(NO_SPACE, *flatten_command(layers, root / "limited" / "image"))
        assert "Disk quota exceeded while writing" in line
        assert os.listdir(root / "limited") == []
        base = write_layer(root / "limited" / "base", SIZE, [])
        run("btrfs", "qgroup", "limit", "8M", root / "limited")
        assert "Disk quota exceeded" in mistake(NO_SPACE, "apply", layers[1], base)
        run("btrfs", "qgroup", "limit", "none", root / "limited")
        # All that the base has by now is the diff's.
        assert diffmergefs("apply", "--force=order", layers[1], base).returncode == 0
        succeed(*flatten_command(layers, root / "limited" / "image"))
        assert (root / "limited" / "image").read_bytes() == ORACLE
        shutil.rmtree(root / "limited", ignore_errors=True)


def run(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True, timeout=60)
