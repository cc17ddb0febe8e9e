"""`apply` overwrites nothing on which something depends, and nothing that looks swapped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs import apply_diff, seal_layer
from diffmergefs.writing.dependants import REASONS
from tests.support.cloudhypervisor import write_snapshot
from tests.support.commands import diffmergefs, mistake
from tests.support.images import PAGE, write_layer
from tests.support.inputs import unchanged
from tests.support.stores import (
    SIZE,
    pages,
    write_chain,
    write_document,
    write_numbered,
)
from tests.support.subjects.dependants import MERGED, base_at, diff, reasons, refusal
from tests.support.superserve import write_sandbox, write_template

__all__ = ["diff"]


# Sealed


@pytest.mark.parametrize("suffix", [".bmap", ".presence"])
@pytest.mark.parametrize("place", ["whole.mem", "link"])
def test_a_seal_or_a_presence_file(diff: Path, public_path: Path, suffix: str, place: str) -> None:
    base, link = base_at(public_path / "whole.mem"), public_path / "link"
    link.symlink_to(base)
    record = public_path / f"{place}{suffix}"
    record.write_text("of old")
    assert f"{record}, which would be false (sealed)" in refusal(diff, link)
    assert record.exists()
    apply_diff(diff, link, force=["sealed"])
    assert not record.exists() and base.read_bytes() == MERGED


def test_swapped_files_leave_the_diff_and_its_seal(diff: Path, public_path: Path) -> None:
    whole = base_at(public_path / "whole.mem")
    seal = Path(seal_layer(diff).path)
    text = refusal(whole, diff)
    assert text.startswith(f"{diff}: not overwritten: ")
    assert f"{whole} covers {PAGE} of its {PAGE} bytes of data: are the two swapped?" in text
    assert text.endswith("--force=sealed,order")
    assert seal.exists()


# A layer of a store


def forkd(root: Path) -> Path:
    return write_chain(root, ["base", "work"]) / "base" / "memory.bin"


def forkd_without_a_document(root: Path) -> Path:
    (forkd(root).parent / "snapshot.json").unlink()
    return root / "base" / "memory.bin"


def forkd_beside_its_tags(root: Path) -> Path:
    memory = root / "base.mem"
    return recorded_elsewhere(root, memory)


def forkd_a_level_deeper(root: Path) -> Path:
    (root / "images").mkdir(parents=True)
    return recorded_elsewhere(root, root / "images" / "base.mem")


def recorded_elsewhere(root: Path, memory: Path) -> Path:
    forkd(root).rename(memory)
    write_document(root, "base", json.dumps({"memory": str(memory)}))
    return memory


def numbered(root: Path) -> Path:
    return write_numbered(root, ["000-base.mem", "001-work.mem"]) / "000-base.mem"


def numbered_with_a_suffix(root: Path) -> Path:
    return write_numbered(root, ["000-base.raw", "001-work.raw"]) / "000-base.raw"


def numbered_with_a_gap(root: Path) -> Path:
    return write_numbered(root, ["000-base.mem", "007-work.mem"]) / "007-work.mem"


def both_layouts(root: Path) -> Path:
    forkd(root)
    return numbered(root)


def superserve(root: Path) -> Path:
    memory = write_template(root)
    write_sandbox(root, "box", memory)
    return memory


def cloud_hypervisor(root: Path) -> Path:
    write_snapshot(root, "base")
    write_snapshot(root, "work", "base", layer=1)
    return root / "base" / "memory-ranges"


STORES = [
    forkd,
    forkd_without_a_document,
    forkd_beside_its_tags,
    forkd_a_level_deeper,
    numbered,
    numbered_with_a_suffix,
    numbered_with_a_gap,
    both_layouts,
    superserve,
]


@pytest.mark.parametrize("make", [*STORES, cloud_hypervisor])
def test_a_layer_of_a_store_and_a_copy_beside_it(
    diff: Path, public_path: Path, make: Callable[[Path], Path]
) -> None:
    layer = make(public_path / "store")
    if make is cloud_hypervisor:
        write_snapshot(public_path / "other", "parent")
        write_snapshot(public_path / "other", "new", "parent", layer=9, numbers=[9])
        diff = public_path / "other" / "new" / "memory-ranges"
    (public_path / "link").symlink_to(layer)
    for path in (layer, public_path / "link"):
        assert "layer" in reasons(diff, path)
    if make is not cloud_hypervisor:  # whose files have one name only
        copy = base_at(layer.parent / "copy.mem")
        assert reasons(diff, copy) == []


def test_the_tag_and_the_store_are_named(diff: Path, public_path: Path) -> None:
    store = public_path / "store"
    text = refusal(diff, forkd(store))
    assert f"it is the layer of 'base' in {store} (layer)" in text


# Links, and who has it open


def test_further_names(diff: Path, public_path: Path) -> None:
    base = base_at(public_path / "whole.mem")
    os.link(base, public_path / "other")
    assert "it has 2 names (hard links)" in refusal(diff, base)
    assert reasons(diff, base) == ["links"]


# A layer of what is mounted


# The other way round


@pytest.mark.parametrize(
    ("numbers", "covered", "expected"),
    [
        (range(10), range(10), ["order"]),
        (range(10), range(9), ["order"]),
        (range(10), range(8), []),
        (range(10), [*range(8), *range(10, 16)], []),
        ([], range(8), []),
    ],
)
def test_a_diff_that_covers_the_base(
    tmp_path: Path, numbers: list[int], covered: list[int], expected: list[str]
) -> None:
    base = write_layer(tmp_path / "base", SIZE, pages(0, numbers))
    diff = write_layer(tmp_path / "diff", SIZE, pages(1, covered))
    assert reasons(diff, base) == expected


# All at once, and --force


def test_an_override_that_is_not_needed_says_nothing(diff: Path, public_path: Path) -> None:
    base = base_at(public_path / "whole.mem")
    done = diffmergefs("apply", "--force=links,open", diff, base)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("names", ["", "all", "links,opened", "links, open"])
def test_a_name_that_is_none_is_bad_usage(diff: Path, public_path: Path, names: str) -> None:
    base = base_at(public_path / "whole.mem")
    with unchanged([base]):
        done = diffmergefs("apply", f"--force={names}", diff, base)
    assert done.returncode == 2 and ", ".join(REASONS) in done.stderr


def test_the_same_file_and_another_size_are_never_overridden(diff: Path, public_path: Path) -> None:
    longer = write_layer(public_path / "longer", SIZE + PAGE, pages(1, [1]))
    with unchanged([diff, longer]):
        assert "same file" in mistake(8, "apply", f"--force={','.join(REASONS)}", diff, diff)
        mistake(4, "apply", f"--force={','.join(REASONS)}", diff, longer)
