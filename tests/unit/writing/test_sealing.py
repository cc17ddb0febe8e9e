"""Making seals: what comes first, what is never replaced, and which commands take them away."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from diffmergefs import apply_diff, flatten, open_chain, seal_layer
from diffmergefs.core.errors import (
    DenseDiffError,
    FileAccessError,
    LayerChangedError,
    OutputRefusedError,
    SealError,
    SizeMismatchError,
    WriterError,
)
from diffmergefs.core.layer import Layer
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.sidecars import bmap, seal
from tests.support.commands import diffmergefs, mistake, succeed
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.inputs import unchanged
from tests.support.stores import age
from tests.support.subjects.sealing import DIFF, EXTENTS, SIZE, diff, recorded

__all__ = ["diff"]

BASE = [(0, signed(0, 0, SIZE))]
ORACLE = overlay_oracle(SIZE, [BASE, DIFF])
DENSE = TrustPolicy(dense=True)


def fill(path: Path) -> None:
    """What `cat` makes of a file: the same bytes, no hole."""
    path.write_bytes(path.read_bytes())


# Making one


def test_a_file_of_holes_has_a_seal_without_ranges(tmp_path: Path) -> None:
    path = write_layer(tmp_path / "diff", SIZE, [])
    assert seal_layer(path).ranges == 0
    assert recorded(path) == []


def test_the_blocks_are_the_guests_pages_or_what_all_extents_fit(tmp_path: Path) -> None:
    aligned = write_layer(tmp_path / "a", SIZE, [(4 * PAGE, signed(1, 4 * PAGE, 8 * PAGE))])
    assert seal_layer(aligned).block == PAGE
    assert seal_layer(aligned, policy=TrustPolicy(page_size=4 * PAGE), force=True).block == 4 * PAGE
    odd = write_layer(tmp_path / "b", SIZE, [(PAGE, signed(1, PAGE, PAGE))])
    policy = TrustPolicy(page_size=4 * PAGE, trust_grain={"all"})
    result = seal_layer(odd, policy=policy)
    assert result.block == PAGE
    assert [line.split(":")[0] for line in result.overridden] == [
        "--trust-grain overrides the check of alignment"
    ]


def test_a_symlinks_seal_is_beside_its_file(diff: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(diff)
    assert seal_layer(tmp_path / "link").path == f"{diff}.bmap"
    Path(f"{diff}.bmap").rename(tmp_path / "link.bmap")
    assert seal_layer(tmp_path / "link").path == str(tmp_path / "link.bmap")


def test_a_layer_without_a_hole_must_be_meant(diff: Path) -> None:
    fill(diff)
    with pytest.raises(DenseDiffError, match="use --dense"):
        seal_layer(diff)
    assert not os.path.exists(f"{diff}.bmap")
    assert seal_layer(diff, policy=DENSE).data_bytes == SIZE


def test_a_layer_with_a_writer_is_refused(diff: Path) -> None:
    with diff.open("r+b"):
        with pytest.raises(WriterError):
            seal_layer(diff)
        assert not os.path.exists(f"{diff}.bmap")
        (line,) = seal_layer(diff, policy=TrustPolicy(allow_writers=True)).overridden
        assert line.startswith("--allow-writers overrides")


def test_a_layer_that_changes_meanwhile_is_not_sealed(
    diff: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = seal.sha256

    def change(layer: Layer, *arguments: object) -> bytes:
        age(diff, mtime_ns=1)
        return known(layer, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(seal, "sha256", change)
    with pytest.raises(LayerChangedError):
        seal_layer(diff)
    assert os.listdir(diff.parent) == ["diff"]


def test_a_layer_that_changes_once_it_was_read_is_not_sealed(
    diff: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = bmap.dump

    def change(*arguments: Any) -> bytes:
        age(diff, mtime_ns=1)
        return known(*arguments)

    monkeypatch.setattr(bmap, "dump", change)
    with pytest.raises(LayerChangedError):
        seal_layer(diff)
    assert os.listdir(diff.parent) == ["diff"]


def test_what_cannot_be_sealed(tmp_path: Path) -> None:
    with pytest.raises(FileAccessError, match="No such file"):
        seal_layer(tmp_path / "missing")
    with pytest.raises(FileAccessError, match="a directory, not a regular file"):
        seal_layer(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(SizeMismatchError, match="is empty"):
        seal_layer(tmp_path / "empty")
    diff = write_layer(tmp_path / "diff", SIZE, DIFF)
    os.mkdir(f"{diff}.bmap")
    with pytest.raises(FileAccessError, match="a directory, not a regular file"):
        seal_layer(diff)
    with pytest.raises(OutputRefusedError, match="no regular file"):
        seal_layer(diff, force=True)


# One that is there


def test_the_same_seal_is_left_as_it_is(diff: Path) -> None:
    seal_layer(diff)
    with unchanged([diff, Path(f"{diff}.bmap")]):
        assert seal_layer(diff).outcome == "unchanged"


def test_a_seal_in_another_form_is_rewritten(diff: Path) -> None:
    result = seal_layer(diff, policy=TrustPolicy(page_size=512, trust_grain={"all"}))
    assert result.block == 512
    assert seal_layer(diff).outcome == "rewritten"
    found = seal.find(str(diff))
    assert found is not None and found.content.block == PAGE


@pytest.mark.parametrize("harm", ["fill", "dig", "write", "nonsense", "truncate"])
def test_a_seal_that_says_something_else_is_kept(diff: Path, harm: str) -> None:
    path = Path(seal_layer(diff).path)
    policy = TrustPolicy()
    match harm:
        case "fill":
            fill(diff)
            policy = DENSE
        case "dig":
            write_layer(diff, SIZE, DIFF[:1])
        case "write":
            write_layer(diff, SIZE, [*DIFF, (9 * PAGE, b"new")])
        case "truncate":
            os.truncate(diff, SIZE - PAGE)
        case _:
            path.write_text("nonsense")
    with unchanged([diff, path]), pytest.raises(SealError, match="replace it with --force only"):
        seal_layer(diff, policy=policy)
    assert seal_layer(diff, policy=policy, force=True).outcome == "rewritten"
    assert recorded(diff) == list(Layer.open(str(diff)).walked)


def test_why_a_seal_with_right_checksums_is_kept(diff: Path) -> None:
    seal_layer(diff)
    write_layer(diff, SIZE, DIFF[:1])  # the pages of zeros became a hole, the bytes are the same
    said = "checksums are right, but with 2 extents of 12288 bytes, .* reports 1 of 4096"
    with pytest.raises(SealError, match=said):
        seal_layer(diff)


# Files that are written


def test_flatten_removes_the_seal_of_what_it_replaces(diff: Path, tmp_path: Path) -> None:
    base = write_layer(tmp_path / "base", SIZE, BASE)
    output = write_layer(tmp_path / "out", SIZE, DIFF)
    seal_layer(output)
    with open_chain(base, [diff]).view as view:
        with pytest.raises(OutputRefusedError):
            flatten(view, output)
        assert recorded(output) == EXTENTS
        flatten(view, output, force=True)
    assert not os.path.exists(f"{output}.bmap") and output.read_bytes() == ORACLE


def test_apply_removes_the_bases_seal_before_its_first_byte(
    diff: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_layer(tmp_path / "base", SIZE, BASE)
    seal_layer(base, policy=DENSE)
    seen: list[bool] = []

    def look(*arguments: object) -> None:
        seen.append(os.path.exists(f"{base}.bmap"))
        raise OSError(5, "not a byte")

    monkeypatch.setattr("diffmergefs.writing.apply.copy_range", look)
    with unchanged([base]), pytest.raises((OSError, FileAccessError)):
        apply_diff(diff, base, force={"sealed"})
    assert seen == [False]


def test_apply_leaves_the_seal_where_it_changes_nothing(diff: Path, tmp_path: Path) -> None:
    base = write_layer(tmp_path / "base", SIZE, BASE)
    path = Path(seal_layer(base, policy=DENSE).path)
    holes = write_layer(tmp_path / "holes", SIZE, [])
    assert apply_diff(holes, base) == 0 and path.exists()
    small = write_layer(tmp_path / "small", SIZE - PAGE, DIFF)
    with pytest.raises(SizeMismatchError):
        apply_diff(small, base)
    fill(diff)
    with pytest.raises(DenseDiffError):
        apply_diff(diff, base)
    assert path.exists()


def test_apply_onto_a_symlink_removes_both_seals(diff: Path, tmp_path: Path) -> None:
    base = write_layer(tmp_path / "base", SIZE, BASE)
    (tmp_path / "link").symlink_to(base)
    for name in ("base.bmap", "link.bmap"):
        (tmp_path / name).write_text("old")
    apply_diff(diff, tmp_path / "link", force={"sealed"})
    assert not (tmp_path / "base.bmap").exists() and not (tmp_path / "link.bmap").exists()


def test_apply_takes_the_extents_of_a_seal(diff: Path, tmp_path: Path) -> None:
    base = write_layer(tmp_path / "base", SIZE, BASE)
    seal_layer(diff)
    fill(diff)
    assert apply_diff(diff, base) == 3 * PAGE
    assert base.read_bytes() == ORACLE


# The command


def test_the_command_seals_each_layer(tmp_path: Path) -> None:
    paths = [write_layer(tmp_path / name, SIZE, DIFF) for name in ("a", "b")]
    lines = succeed("seal", *paths).splitlines()
    assert lines[0].split() == ["SEAL", "DONE", "RANGES", "DATA", "BLOCK"]
    numbers = ["written", "2", str(3 * PAGE), "(12", "KiB)", str(PAGE)]
    assert [line.split() for line in lines[1:]] == [[f"{p}.bmap", *numbers] for p in paths]
    assert "unchanged" in succeed("seal", paths[0])


def test_the_command_speaks_json(diff: Path) -> None:
    (found,) = json.loads(succeed("seal", "--json", diff))
    assert found == {
        "path": f"{diff}.bmap",
        "outcome": "written",
        "ranges": 2,
        "data_bytes": 3 * PAGE,
        "block": PAGE,
        "overridden": [],
        "hints": [],
    }


def test_the_command_goes_on_after_a_layer_that_cannot_be_sealed(tmp_path: Path) -> None:
    paths = [write_layer(tmp_path / name, SIZE, DIFF) for name in ("a", "b", "c")]
    fill(paths[1])
    done = diffmergefs("seal", *paths)
    assert done.returncode == DenseDiffError.exit_code
    assert done.stderr.count("\n") == 1 and str(paths[1]) in done.stderr
    assert os.path.exists(f"{paths[2]}.bmap") and not os.path.exists(f"{paths[1]}.bmap")
    assert [f["path"] for f in json.loads(diffmergefs("seal", "--json", *paths).stdout)] == [
        f"{paths[0]}.bmap",
        f"{paths[2]}.bmap",
    ]


def test_the_mistakes_of_the_command(diff: Path) -> None:
    assert diffmergefs("seal").returncode == 2
    path = Path(succeed("seal", diff).splitlines()[1].split()[0])
    path.write_text("nonsense")
    said = mistake(SealError.exit_code, "seal", diff)
    assert "--force" in said
    assert "rewritten" in succeed("seal", "--force", diff)


@pytest.mark.slow
def test_the_commands_that_read_go_by_the_seal(diff: Path, tmp_path: Path) -> None:
    base = write_layer(tmp_path / "base", SIZE, BASE)
    succeed("seal", diff)
    fill(diff)
    chain = ("--base", base, "--diff", diff)
    (_, layer) = json.loads(succeed("info", "--json", *chain))["layers"]
    assert (layer["trust"], layer["extents"]) == ("sealed", 2)
    said = succeed("flatten", *chain, "-o", tmp_path / "out", "--seal")
    assert said.endswith(", sealed\n") and recorded(tmp_path / "out") == [(0, SIZE)]
    assert (tmp_path / "out").read_bytes() == ORACLE
    assert "sound" in succeed("verify", *chain)
    for verb in ("info", "flatten", "verify"):
        output = ["-o", str(tmp_path / "new")] if verb == "flatten" else []
        done = diffmergefs(verb, "--no-seal", *chain, *output)
        assert done.returncode == (1 if verb == "verify" else DenseDiffError.exit_code)
    with diff.open("r+b") as file:
        file.write(b"!")
    assert "stale seal" in mistake(SealError.exit_code, "info", *chain)
    done = diffmergefs("verify", "--json", *chain)
    assert done.returncode == 1
    facts = json.loads(done.stdout)
    assert [fault["kind"] for fault in facts["faults"]] == ["seal"]
    assert [layer["seal"] for layer in facts["layers"]] == [None, "wrong"]
