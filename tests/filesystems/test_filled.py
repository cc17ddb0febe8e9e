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
from diffmergefs.opening.images import open_chain, open_image
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.writing.sealing import seal_layer
from tests.support.commands import diffmergefs, mistake, succeed
from tests.support.images import PAGE, signed, store_mapped, write_layer
from tests.support.mounts import mounted
from tests.support.stores import age, pages, write_chain, write_tag

MIB = 1 << 20
SIZE = 32 * MIB
BASE = [(0, signed(0, 0, SIZE))]
FEW = [100, 3000, 7000]

Extents = list[tuple[int, bytes]]


def hints(base: Path, *diffs: Path, **options: object) -> list[str]:
    return [str(h) for h in open_chain(base, diffs, TrustPolicy(**options)).hints]  # type: ignore[arg-type]


def base_in(directory: Path) -> Path:
    return write_layer(directory / "base", SIZE, BASE)


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


def zeros(first: int, count: int) -> tuple[int, bytes]:
    return first * PAGE, bytes(count * PAGE)


def folio(first: int, count: int, *stored: int) -> Extents:
    """An extent of zeros with these of its pages stored."""
    return [zeros(first, count), *pages(1, [first + n for n in stored])]


SMALL = [folio(first, 4, 1) for first in (8, 40, 72)]
HEALTHY: dict[str, Extents] = {
    "nothing": [],
    "one aligned extent": pages(1, range(16, 32)),
    "one aligned extent of zeros": [zeros(16, 16)],
    "a kernel stack": folio(16, 4, 3),
    "two of them": [*SMALL[0], *SMALL[1]],
    "a page of it wiped": [*pages(1, range(64, 128)), zeros(70, 1)],
    "large, half wiped": [*pages(1, range(128, 192)), zeros(192, 64)],
    "a wiped block beside a written one": [zeros(256, 256), *pages(1, range(512, 544))],
    "not in its place": folio(30, 64, 5),
    "many wiped, of any shape": [zeros(64 * n + n % 4, 4 + n % 3) for n in range(60)],
    "small ones, as many of other shapes": [
        *(extent for small in SMALL for extent in small),
        *(extent for n in range(4) for extent in folio(1001 + 16 * n, 5, 1)),
    ],
}
FILLED: dict[str, Extents] = {
    "one store in a large folio": folio(64, 64, 5),
    "at the end of the file": folio(SIZE // PAGE - 64, 64, 63),
    "beside healthy pages": [*folio(512, 512, 5), *pages(1, range(2001, 4000, 2))],
    "three small folios": [extent for small in SMALL for extent in small],
    "written through a mapping": [
        extent for n in range(10) for extent in folio(64 * n, 16, *range(12))
    ],
}


@pytest.mark.parametrize("name", HEALTHY)
def test_what_a_guest_may_write_gives_no_hint(tmp_path: Path, name: str) -> None:
    diff = write_layer(tmp_path / "diff", SIZE, HEALTHY[name])
    assert hints(base_in(tmp_path), diff, strict=True) == []


@pytest.mark.parametrize("name", FILLED)
def test_what_looks_filled_gives_one(tmp_path: Path, name: str) -> None:
    diff = write_layer(tmp_path / "diff", SIZE, FILLED[name])
    (hint,) = hints(base_in(tmp_path), diff)
    with pytest.raises(UntrustedExtentsError, match="--strict") as caught:
        hints(tmp_path / "base", diff, strict=True)
    assert caught.value.check == "filled" and str(caught.value).startswith(hint.split("; ")[0])
    assert caught.value.remedy.startswith("take the diff again")


def test_the_numbers_of_a_hint(tmp_path: Path) -> None:
    diff = write_layer(tmp_path / "diff", SIZE, folio(64, 64, 5) + folio(512, 512, 1, 2))
    assert hints(base_in(tmp_path), diff) == [
        f"{diff}: looks as if holes were filled: {63 + 510} zero pages in 2 aligned extents at"
        " 0x40000...; harmless if the guest wiped or freed them"
    ]


def test_the_parents_view_counts(tmp_path: Path) -> None:
    base = base_in(tmp_path)
    diff = write_layer(tmp_path / "diff", SIZE, folio(64, 64, 5))
    wiped = write_layer(tmp_path / "wiped", SIZE, [zeros(30, 120)])
    assert len(hints(base, diff)) == 1
    # Over zeros of the parent, zeros hide nothing.
    assert hints(base, wiped, diff) == []


def test_larger_guest_pages_have_larger_folios(tmp_path: Path) -> None:
    base = base_in(tmp_path)
    # Whole pages of 16 KiB, each with 4 KiB of data: in their place, but no folio fills less.
    diff = write_layer(tmp_path / "diff", SIZE, [e for n in range(50) for e in folio(8 * n, 4, 1)])
    assert len(hints(base, diff)) == 1
    assert hints(base, diff, page_size=16384) == []


def test_a_record_says_what_the_guest_wrote(tmp_path: Path) -> None:
    base = base_in(tmp_path)
    diff = write_layer(tmp_path / "diff", SIZE, folio(64, 64, 5))
    seal_layer(diff)
    assert hints(base, diff, strict=True) == []
    assert len(hints(base, diff, no_seal=True)) == 1


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What layers are read: the name of each one's file, and how many bytes."""
    found: list[tuple[str, int]] = []
    real = Layer.read_into

    def counted(self: Layer, buffer: memoryview, offset: int, *, nowait: bool = False) -> None:
        found.append((os.path.basename(self.path), len(buffer)))
        real(self, buffer, offset, nowait=nowait)

    monkeypatch.setattr(Layer, "read_into", counted)
    return found


def test_without_an_extent_of_that_shape_nothing_is_read(
    tmp_path: Path, reads: list[tuple[str, int]]
) -> None:
    diff = write_layer(tmp_path / "diff", SIZE, [zeros(64 * n + 1, 4) for n in range(60)])
    assert hints(base_in(tmp_path), diff) == []
    assert reads == []


@pytest.mark.parametrize("stride", [16, 600])
def test_reading_is_bounded_and_an_extent_is_read_in_one_go(
    tmp_path: Path, reads: list[tuple[str, int]], stride: int
) -> None:
    size = 256 * MIB
    count = size // PAGE // stride
    base = write_layer(tmp_path / "base", size, [(0, b"x" * size)])
    held = [zeros(n * stride, stride - 4) for n in range(count)]
    diff = write_layer(tmp_path / "diff", size, held)
    hints(base, diff)
    ours = [length for name, length in reads if name == "diff"]
    assert sum(ours) == 8 * MIB
    # In the pieces that lie as folios do; [0, 12) is [0, 8) and [8, 12).
    assert len(ours) <= sum(ours) // (4 * PAGE)


def test_it_is_looked_for_once(tmp_path: Path, reads: list[tuple[str, int]]) -> None:
    store = tmp_path / "store"
    filled_store(store, 3)
    policy = f"--state-dir={tmp_path / 'state'}"
    first = diffmergefs("list", policy, store)
    assert first.stderr.count("looks as if holes were filled") == 3
    assert diffmergefs("list", policy, store).stderr == first.stderr


# In every verb


def filled_store(store: Path, count: int) -> list[str]:
    """A chain of so many diffs that look filled, over a base; their tags."""
    write_tag(store, "base", numbers=range(SIZE // PAGE), size=SIZE)
    tags = [f"t{n}" for n in range(count)]
    for n, tag in enumerate(tags):
        write_tag(store, tag, tags[n - 1] if n else "base", layer=n + 1, size=SIZE)
        memory = store / tag / "memory.bin"
        write_layer(memory, SIZE, folio(64 + 1024 * n, 64, 5))
        age(memory)
    return tags


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
