"""`flatten` killed with SIGKILL: its output is whole, or as it was before."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from diffmergefs.writing.flatten import flatten
from tests.support.commands import succeed
from tests.support.images import overlay_oracle, signed, write_layer
from tests.support.inputs import unchanged
from tests.support.victims import ENDED, PHASES, Victim, open_view

KILLED = -9
MIB = 1 << 20
SIZE = 32 * MIB
CHAIN = [
    [(0, signed(0, 0, 24 * MIB))],
    [(n * MIB, signed(1, n * MIB, MIB // 2)) for n in range(0, 32, 2)],
    [(n * MIB + 4096, bytes(4096)) for n in range(0, 32, 4)],
]
NEW = overlay_oracle(SIZE, CHAIN)
OLD = b"what stood there before" * 1000
LITTER = re.compile(r"\.diffmergefs-[0-9a-f]{16}\.tmp")


class Place:
    """A directory of layers, and another one for the output, on one filesystem."""

    def __init__(self, path: Path, unnamed: bool) -> None:
        self.unnamed = unnamed
        (path / "layers").mkdir()
        (path / "out").mkdir()
        self.out = path / "out" / "whole.mem"
        self.layers = [
            write_layer(path / "layers" / f"{n}", SIZE, extents) for n, extents in enumerate(CHAIN)
        ]

    def reset(self, force: bool) -> None:
        """What stands at the output before a run: nothing, or with `force` an old file."""
        self.out.unlink(missing_ok=True)
        if force:
            self.out.write_bytes(OLD)

    def judge(self, force: bool) -> tuple[str, int]:
        """What a killed run left: 'nothing', 'old' or 'new' under the name, and its litter."""
        names = os.listdir(self.out.parent)
        litter = [name for name in names if name != self.out.name]
        assert all(LITTER.fullmatch(name) for name in litter), litter
        if not self.out.exists():
            assert not force, "the old file is gone"
            return "nothing", len(litter)
        found = self.out.read_bytes()
        if force and found == OLD:
            return "old", len(litter)
        assert found == NEW, f"a wrong or partial file of {len(found)} bytes"
        return "new", len(litter)

    def require_clean(self) -> None:
        """After a run that was not killed: just the output, and all of it."""
        assert os.listdir(self.out.parent) == [self.out.name]
        assert self.out.read_bytes() == NEW


@pytest.fixture(params=["ext4", "xfs", "ext4, no O_TMPFILE", "tmpfs, no O_TMPFILE"])
def place(request: pytest.FixtureRequest, filesystem: Callable[[str], Path]) -> Iterator[Place]:
    kind, _, without = request.param.partition(", ")
    path = filesystem(kind)
    found = Place(path, unnamed=not without)
    with unchanged(found.layers):
        yield found
    shutil.rmtree(path)


@pytest.mark.parametrize("force", [False, True], ids=["new", "replace"])
def test_kills_at_random_moments(
    place: Place, force: bool, count: Callable[[int], int], seen: Callable[..., None]
) -> None:
    """SIGKILL at a random moment of a random phase, and a next run after each."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    place.reset(force)
    whole = Victim(place.layers, place.out, force=force, unnamed=place.unnamed)
    assert whole.wait() == 0
    place.require_clean()
    died: Counter[str] = Counter()
    left: Counter[str] = Counter()
    litter = 0
    kills = count(22)
    while sum(died.values()) < kills:
        place.reset(force)
        victim = Victim(place.layers, place.out, force=force, unnamed=place.unnamed)
        phase = victim.kill(dice, whole.durations())
        state, remains = place.judge(force)
        if phase == ENDED:
            assert (state, remains) == ("new", 0)
        else:
            died[PHASES[phase]] += 1
            left[state] += 1
            litter += remains
        if state == "new" and not force:
            place.out.unlink()
        following = Victim(place.layers, place.out, force=force, unnamed=place.unnamed)
        assert following.wait() == 0
        place.require_clean()
    seen(kills=kills, died_while=died, left=left, litter_before_the_next_run=litter)


@pytest.mark.parametrize("force", [False, True], ids=["new", "replace"])
@pytest.mark.parametrize("step", ["open", "ftruncate", "fchmod", "fsync", "link", "replace"])
def test_a_kill_right_after_a_step(place: Place, force: bool, step: str) -> None:
    """The child kills itself right after a system call of the output."""
    place.reset(force)
    victim = Victim(place.layers, place.out, force=force, unnamed=place.unnamed, kill_itself=step)
    never = {"replace"} if not force else set() if place.unnamed else {"link"}
    assert victim.wait() == (0 if step in never else KILLED)
    state, litter = place.judge(force)
    is_new = step in {"replace", *never} or (step == "link" and not force)
    assert state == ("new" if is_new else "old" if force else "nothing")
    named = not place.unnamed and step not in never and not (force and step == "replace")
    assert litter == int(named or (place.unnamed and force and step == "link"))
    place.reset(force)
    with open_view(place.layers) as view:
        flatten(view, place.out, force=force)
    place.require_clean()


@pytest.mark.parametrize("force", [False, True], ids=["new", "replace"])
def test_the_command_is_killed(
    filesystem: Callable[[str], Path],
    force: bool,
    count: Callable[[int], int],
    seen: Callable[..., None],
) -> None:
    """`diffmergefs flatten`, killed at a random moment after its start."""
    path = filesystem("ext4")
    place = Place(path, unnamed=True)
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    layers = ["--base", place.layers[0], *(a for d in place.layers[1:] for a in ("--diff", d))]
    arguments = ["flatten", *map(str, layers), "-o", str(place.out), *["--force"] * force]
    killed = 0
    left: Counter[str] = Counter()
    with unchanged(place.layers):
        place.reset(force)
        started = time.monotonic()
        succeed(*arguments)
        seconds = time.monotonic() - started
        while killed < count(12):
            place.reset(force)
            command = [sys.executable, "-m", "diffmergefs", *arguments]
            with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
                time.sleep(dice.random() * seconds)
                process.kill()
            state, _ = place.judge(force)
            assert process.returncode in (0, KILLED)
            killed += process.returncode == KILLED
            left[state] += process.returncode == KILLED
            if state == "new" and not force:
                place.out.unlink()
            succeed(*arguments)
            place.require_clean()
    seen(kills=killed, left=left)
    shutil.rmtree(path)
