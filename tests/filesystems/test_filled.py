"""Diffs whose holes were filled where no metadata tells: a hint, and with --strict a refusal."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from diffmergefs.core.errors import UntrustedExtentsError
from diffmergefs.core.layer import Layer
from diffmergefs.opening.images import open_image
from tests.support.commands import diffmergefs, mistake, succeed
from tests.support.images import PAGE, signed, store_mapped, write_layer
from tests.support.mounts import mounted
from tests.support.stores import pages, write_chain
from tests.support.subjects.filled import (
    SIZE,
    base_in,
    filled_store,
    folio,
    hints,
)

FEW = [100, 3000, 7000]


# Real stores through mappings


def harmed(path: Path, numbers: Iterable[int] = FEW, written: Iterable[int] = ()) -> Path:
    """A diff of these pages, stored through a mapping of a file that somebody has read."""
    write_layer(path, SIZE, pages(1, written))
    store_mapped(path, pages(1, numbers))
    return path


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
@pytest.mark.parametrize(
    ("numbers", "written"),
    [
        (FEW, []),
        ([7000], []),
        ([7000, 7001, 7002], []),
        ([5000, 5010, 5020, 5030], []),
        (range(0, 4000, 2), []),
        ([n * 16 + i for n in range(200) for i in range(10)], []),  # less than half is zeros
    ],
)
def test_stores_through_a_mapping_of_what_is_cached_give_a_hint(
    filesystem: Callable[[str], Path], kind: str, numbers: Sequence[int], written: Sequence[int]
) -> None:
    directory = filesystem(kind)
    diff = harmed(directory / "diff", numbers, written)
    wrong = Layer.open(str(diff)).extents.data_bytes // PAGE - len({*numbers, *written})
    assert wrong > 50
    (hint,) = hints(base_in(directory), diff)
    assert hint.startswith(f"{diff}: looks as if holes were filled: ")
    assert hint.endswith("; harmless if the guest wiped or freed them") and " at 0x" in hint
    for path in directory.iterdir():
        path.unlink()


def test_the_same_pages_written_give_none(real_fs: Path) -> None:
    base = base_in(real_fs)
    diff = write_layer(real_fs / "diff", SIZE, pages(1, FEW))
    assert hints(base, diff) == []


def test_a_mapping_of_what_is_not_cached_is_right(real_fs: Path) -> None:
    diff = write_layer(real_fs / "diff", SIZE, [])
    with diff.open("r+b") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(file.fileno(), 0) as memory:
            for offset, data in pages(1, FEW):
                memory[offset : offset + PAGE] = data
            memory.flush()
    layer = Layer.open(str(diff))
    assert layer.extents.data_bytes == len(FEW) * PAGE
    assert hints(base_in(real_fs), diff) == []


def test_btrfs_is_right_with_a_mapping_too(filesystem: Callable[[str], Path]) -> None:
    directory = filesystem("btrfs")
    diff = harmed(directory / "diff")
    assert Layer.open(str(diff)).extents.data_bytes == len(FEW) * PAGE
    assert hints(base_in(directory), diff) == []


# By shape and content


# In every verb


@pytest.fixture
def layers(tmp_path: Path) -> list[str]:
    diff = write_layer(tmp_path / "diff", SIZE, folio(64, 64, 5))
    return ["--base", str(base_in(tmp_path)), "--diff", str(diff)]


LINE = "looks as if holes were filled: 63 zero pages in 1 aligned extent at 0x40000; "


@pytest.mark.parametrize("verb", ["info", "verify", "seal", "flatten", "map"])
def test_each_verb_gives_the_hint_once(tmp_path: Path, layers: list[str], verb: str) -> None:
    output: list[str | Path] = ["-o", tmp_path / "out"] if verb == "flatten" else []
    done = diffmergefs(verb, *layers, *output)
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"diffmergefs: {layers[-1]}: {LINE}")


@pytest.mark.parametrize("verb", ["info", "verify", "seal"])
def test_json_has_the_hint(layers: list[str], verb: str) -> None:
    facts = json.loads(succeed_with_hint(verb, "--json", *layers))
    (hint,) = (facts[0] if verb == "seal" else facts)["hints"]
    assert hint.startswith(f"{layers[-1]}: {LINE}")


def succeed_with_hint(*arguments: str | Path) -> str:
    done = diffmergefs(*arguments)
    assert done.returncode == 0 and LINE in done.stderr
    return done.stdout


@pytest.mark.parametrize("verb", ["info", "verify", "seal", "flatten", "mount"])
def test_strict_refuses(tmp_path: Path, layers: list[str], mountpoint: Path, verb: str) -> None:
    output: dict[str, list[str | Path]] = {
        "flatten": ["-o", tmp_path / "out"],
        "mount": ["--log=/dev/null", mountpoint],
    }
    done = diffmergefs(verb, "--strict", *layers, *output.get(verb, []))
    assert done.returncode == (1 if verb == "verify" else 5)
    assert LINE in done.stdout + done.stderr
    assert sorted(os.listdir(tmp_path)) == ["base", "diff"]


def test_list_and_doctor_name_each_layer_once(tmp_path: Path) -> None:
    tags = filled_store(tmp_path, 3)
    done = diffmergefs("list", "--json", tmp_path)
    rows = json.loads(done.stdout)
    found = {row["tag"]: len(row["hints"]) for row in rows}
    assert found == {"base": 0, **dict.fromkeys(tags, 1)}
    assert done.stderr.count("looks as if holes were filled") == 3
    strict = json.loads(succeed("list", "--strict", "--json", tmp_path))
    assert [row["state"] for row in strict] == ["complete", *["broken"] * 3]
    findings = json.loads(succeed("doctor", "--json", tmp_path))
    filled = [f for f in findings if f["check"] == "filled"]
    assert [f["subject"] for f in filled] == [str(tmp_path / t / "memory.bin") for t in tags]
    assert {f["severity"] for f in filled} == {"warning"}
    assert all(f["why"] and f["remedy"] for f in filled)


def test_a_mount_logs_it_once_a_layer(public_path: Path, mountpoint: Path) -> None:
    store = public_path / "store"
    tags = filled_store(store, 3)
    with mounted(store, mountpoint, expect_log=("looks as if holes were filled",)) as mount:
        for tag in reversed(tags):
            assert (mountpoint / tag / "memory.bin").stat().st_size == SIZE
        log = mount.log()
        for n, tag in enumerate(tags):
            assert log.count(f"{tag}/memory.bin: looks as if holes were filled: 63 zero") == 1, n
    with mounted(store, mountpoint, "-o", "strict", expect_log=("--strict",)):
        assert "memory.bin" in os.listdir(mountpoint / "base")
        assert "memory.bin" not in os.listdir(mountpoint / "t0")


def test_seal_over_what_lies_below(tmp_path: Path, layers: list[str]) -> None:
    other = str(write_layer(tmp_path / "other", SIZE, folio(64, 64, 5)))
    # Over a layer that has wiped the same pages there, zeros hide nothing.
    succeed("seal", *layers, other)
    assert sorted(os.listdir(tmp_path)) == ["base", "diff", "other", "other.bmap"]
    assert LINE in mistake(5, "seal", *layers[:2], other, "--strict", "--force")
    for arguments in (["--strict", other], layers[2:]):
        done = diffmergefs("seal", *arguments)
        assert done.returncode == 2 and "need --base" in done.stderr
    assert "name the layers" in diffmergefs("seal").stderr
    assert "--base" not in succeed("seal", "--force", other)


def test_the_diffs_of_a_store_are_held_to_law_4(filesystem: Callable[[str], Path]) -> None:
    store = write_chain(filesystem("xfs16k"), ["base", "one"])
    with pytest.raises(UntrustedExtentsError) as caught:
        open_image(store / "one")
    assert caught.value.check == "grain"
    assert open_image(store / "base").view.read(0, PAGE) == signed(0, 0, PAGE)
