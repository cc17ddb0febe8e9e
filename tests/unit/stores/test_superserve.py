"""superserve's snapshots: chains against an oracle, and a refusal for each that is not whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffmergefs import apply_diff, open_chain, open_image
from diffmergefs.core.errors import BrokenChainError, DiffMergeError
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.stores.catalog import StoreOptions, read_catalog
from tests.support.commands import diffmergefs, mistake, succeed
from tests.support.images import PAGE, overlay_oracle, write_layer
from tests.support.stores import SIZE, age, pages
from tests.support.subjects.superserve import BASE, TAGS, image, store
from tests.support.superserve import write_sandbox, write_template

__all__ = ["store"]


def reason(store: Path, tag: str) -> str:
    with pytest.raises(DiffMergeError) as caught:
        read_catalog(str(store), "superserve").chain(tag)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text


def test_a_tag_is_its_path_with_plus_for_slash(store: Path) -> None:
    catalog = read_catalog(str(store))
    assert (catalog.layout, sorted(catalog.snapshots)) == ("superserve", TAGS)
    for tag in TAGS[1:]:
        assert [link.tag for link in catalog.chain(tag)] == ["templates+python", tag]
        assert catalog.chain(tag)[0].layer.path == "templates/python/mem.snap"


def test_list_info_verify_and_flatten(store: Path, tmp_path: Path) -> None:
    rows = json.loads(succeed("list", "--json", store))
    assert [(row["tag"], row["parent"], row["dirty_bytes"], row["state"]) for row in rows] == [
        (TAGS[0], None, 15 * PAGE, "complete"),
        (TAGS[1], TAGS[0], 2 * PAGE, "complete"),
        (TAGS[2], TAGS[0], 2 * PAGE, "complete"),
    ]
    facts = json.loads(succeed("info", "--json", store / "vm-1"))
    assert [layer["trust"] for layer in facts["layers"]] == ["base", "recorded"]
    assert succeed("verify", store / "vm-1").startswith("sound: 2 layers")
    succeed("flatten", store / "vm-1", "-o", tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == image(1, [1, 5])


@given(
    layers=st.lists(st.sets(st.integers(0, 15)), min_size=1, max_size=4),
    zeros=st.sets(st.integers(0, 15)),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_random_chains_against_the_oracle(
    layers: list[set[int]], zeros: set[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("store")
    below = write_template(root)
    oracle = [BASE]
    for n, numbers in enumerate(layers, 1):
        extents = pages(n, numbers) + [(page * PAGE, bytes(PAGE)) for page in zeros & numbers]
        diff = write_sandbox(root, f"vm-{n}", below, layer=n, numbers=numbers)
        write_layer(diff, SIZE, extents)
        age(diff)
        below = diff
        oracle.append(extents)
        opened = open_image(root / f"vm-{n}", TrustPolicy(dense=True))
        with opened.view as view:
            assert view.read(0, SIZE) == overlay_oracle(SIZE, oracle)


def beside(store: Path, suffix: str) -> Path:
    return store / "vm-1" / f"mem.diff{suffix}"


def write_base(text: str | bytes) -> Callable[[Path], object]:
    data = text.encode() if isinstance(text, str) else text
    return lambda store: beside(store, ".base").write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda s: beside(s, ".base").unlink(), "mem.diff.base: is missing"),
        (write_base(""), "'' is not an absolute path"),
        (write_base("templates/python/mem.snap"), "is not an absolute path"),
        (write_base("/a/../b"), "is not an absolute path"),
        (write_base(b"/a\0b"), "is not an absolute path"),
        (write_base("/elsewhere/mem.snap"), "is not at that path beneath"),
        (write_base("/" + "x" * 5000), "over 4096 bytes, too large"),
        (lambda s: beside(s, ".presence").unlink(), "mem.diff.presence: is missing"),
        (lambda s: beside(s, ".presence").write_bytes(b""), "the save was interrupted"),
        (lambda s: beside(s, ".presence").write_bytes(b"U"), "could not derive"),
        (lambda s: beside(s, ".presence").write_bytes(b"V"), "1 bytes are too few"),
        (lambda s: (s / "vm-1/mem.snap").touch(), "holds mem.snap and mem.diff"),
        (lambda s: os.truncate(s / "vm-1/mem.diff", SIZE + PAGE), f"{SIZE + PAGE}"),
        (lambda s: (s / "templates/python/mem.snap").unlink(), "is not at that path beneath"),
    ],
)
def test_what_is_not_whole_is_refused_by_a_look(
    store: Path, harm: Callable[[Path], object], expected: str
) -> None:
    harm(store)
    assert expected in reason(store, "vm-1")
    if (store / "templates/python/mem.snap").exists():
        assert len(read_catalog(str(store), "superserve").chain("vm-1+snap-2")) == 2


def test_the_symlinks_in_place_of_its_records_are_not_followed(store: Path, tmp_path: Path) -> None:
    for suffix in (".base", ".presence"):
        path = beside(store, suffix)
        path.rename(tmp_path / suffix)
        path.symlink_to(tmp_path / suffix)
        assert "regular file" in reason(store, "vm-1")
        path.unlink()
        (tmp_path / suffix).rename(path)
    assert len(read_catalog(str(store)).chain("vm-1")) == 2


def test_the_sandboxes_own_image_never_stands_in_for_its_templates(store: Path) -> None:
    # As after a move of the store: the recorded path is stale, a file of that name is at hand.
    write_base("/var/lib/sandbox/snapshots/vm-1/mem.snap")(store)
    write_layer(store / "vm-1" / "mem.snap", SIZE, pages(9, range(16)))
    assert "is not at that path beneath" in reason(store, "vm-1")


def test_a_base_outside_needs_leave_and_is_a_snapshot_then(store: Path, tmp_path: Path) -> None:
    base = write_layer(tmp_path / "lone.mem", SIZE, pages(7, range(16)))
    write_base(str(base))(store)
    assert "--allow-outside" in reason(store, "vm-1")
    catalog = read_catalog(str(store), options=StoreOptions(allow_outside=(str(tmp_path),)))
    links = catalog.chain("vm-1")
    assert [link.layer.path for link in links] == [str(base), "vm-1/mem.diff"]
    opened = open_image(store / "vm-1", TrustPolicy(allow_outside=(str(tmp_path),)))
    with opened.view as view:
        expected = overlay_oracle(SIZE, [pages(7, range(16)), pages(1, [1, 5])])
        assert view.read(0, SIZE) == expected


def test_a_snapshot_named_like_a_lone_base_is_not_taken_for_it(store: Path) -> None:
    write_layer(store / "lone", SIZE, pages(7, range(16)))
    write_base(str(store / "vm-2" / "lone.mem"))(store)
    (store / "vm-2").mkdir()
    write_layer(store / "vm-2" / "lone.mem", SIZE, pages(7, range(16)))
    write_template(store, "vm-2+lone.mem", layer=8)
    assert "have the same tag, 'vm-2+lone.mem'" in reason(store, "vm-1")


def test_two_directories_of_one_tag_are_broken_and_no_other(store: Path) -> None:
    other = write_template(store, "templates/other", layer=9)
    write_template(store, "templates+python")
    write_sandbox(store, "vm-3", other)
    assert "have the same tag, 'templates+python'" in reason(store, "templates+python")
    catalog = read_catalog(str(store))
    for tag, base in (("vm-1", "python"), ("vm-3", "other")):  # which is meant their paths say
        assert catalog.chain(tag)[0].layer.path == f"templates/{base}/mem.snap"
    assert {"templates/python/mem.snap", "templates+python/mem.snap"} <= catalog.hidden


def test_a_diff_over_itself_is_a_cycle(store: Path) -> None:
    write_base(str(store / "vm-1" / "mem.diff"))(store)
    assert reason(store, "vm-1").startswith("cycle: vm-1 -> vm-1")


def test_a_directory_with_a_document_is_not_superserves(store: Path) -> None:
    (store / "vm-1" / "snapshot.json").write_text('{"memory": "mem.diff"}')
    with pytest.raises(BrokenChainError, match="--layout=forkd or --layout=superserve"):
        read_catalog(str(store))
    assert "vm-1" not in read_catalog(str(store), "superserve").snapshots


def test_a_diff_is_no_explicit_base(store: Path) -> None:
    diff = store / "vm-1" / "mem.diff"
    for layers in ((diff,), (diff, store / "vm-1/snap-2/mem.diff")):
        with pytest.raises(BrokenChainError, match=r"is a diff, and .*mem\.diff\.base names"):
            open_chain(layers[0], layers[1:])
    assert diffmergefs("verify", "--base", diff).returncode == 1
    with pytest.raises(BrokenChainError, match=r"is a diff, and .*mem\.diff\.base names"):
        apply_diff(store / "vm-1/snap-2/mem.diff", diff)
    beside(store, ".base").unlink()
    with open_chain(diff).view as view:
        assert view.size == SIZE


def test_the_command_line_says_why_in_one_line(store: Path, mountpoint: Path) -> None:
    beside(store, ".presence").write_bytes(b"")
    assert "the save was interrupted" in mistake(3, "info", store / "vm-1")
    listed = diffmergefs("list", store)
    assert listed.returncode == 0 and "broken: vm-1/mem.diff.presence: is empty" in listed.stdout
    explicit = ("--base", store / "templates/python/mem.snap", "--diff", store / "vm-1/mem.diff")
    assert "the save was interrupted" in mistake(21, "flatten", *explicit, "-o", mountpoint / "x")
    verified = diffmergefs("verify", "--json", *explicit)
    faults = [fault["kind"] for fault in json.loads(verified.stdout)["faults"]]
    assert (verified.returncode, faults) == (1, ["presence"])
