"""Numbered layers: which files are layers, in which order, and what goes with them."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from diffmergefs.core.errors import BrokenChainError
from diffmergefs.opening.images import open_image
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.stores.catalog import Catalog, StoreOptions, read_catalog
from diffmergefs.stores.numbered import memory_files
from tests.support.commands import diffmergefs, mistake, succeed
from tests.support.images import overlay_oracle, write_layer
from tests.support.stores import (
    BASE_PAGES,
    SIZE,
    age,
    pages,
    write_numbered,
    write_tag,
)


def tags(catalog: Catalog) -> list[str]:
    return list(catalog.snapshots)


def chain(catalog: Catalog, tag: str) -> list[str]:
    return [link.layer.path for link in catalog.chain(tag)]


def test_the_chain_is_the_numeric_order_and_not_the_lexical_one(tmp_path: Path) -> None:
    write_numbered(tmp_path, ["1-base.mem", "2-two.mem", "10-ten.mem"])
    catalog = read_catalog(str(tmp_path), options=StoreOptions(allow_gaps=True))
    assert catalog.layout == "numbered"
    assert tags(catalog) == ["base", "two", "ten"]
    assert chain(catalog, "ten") == ["1-base.mem", "2-two.mem", "10-ten.mem"]
    assert chain(catalog, "two") == ["1-base.mem", "2-two.mem"]


def test_a_layer_file_as_image_is_the_chain_up_to_it(tmp_path: Path) -> None:
    write_numbered(tmp_path, ["000-base.mem", "001-numpy.mem", "002-pandas.mem"])
    layers = [pages(0, BASE_PAGES), pages(1, [1])]
    with open_image(tmp_path / "001-numpy.mem").view as view:
        assert view.read(0, SIZE) == overlay_oracle(SIZE, layers)


def test_what_lies_above_a_gap_is_refused_with_how_many_are_missing(tmp_path: Path) -> None:
    write_numbered(tmp_path, ["000-base.mem", "001-a.mem", "003-b.mem", "004-c.mem", "9-d.mem"])
    catalog = read_catalog(str(tmp_path))
    assert len(catalog.chain("a")) == 2
    for tag, words in {
        "b": "003-b.mem: 1 layer is missing between it and 001-a.mem; put back",
        "c": "ancestor 'b' is broken: 003-b.mem: 1 layer is missing",
        "d": "9-d.mem: 4 layers are missing between it and 004-c.mem; put back",
    }.items():
        with pytest.raises(BrokenChainError) as caught:
            catalog.chain(tag)
        assert str(caught.value).startswith(words)
        assert str(caught.value).endswith(" --allow-gaps")
    assert {"003-b.mem", "004-c.mem", "9-d.mem"} <= catalog.hidden
    accepted = read_catalog(str(tmp_path), options=StoreOptions(allow_gaps=True))
    assert len(chain(accepted, "d")) == 5


@pytest.mark.parametrize("lowest", ["1-base.mem", "003-base.mem"])
def test_a_lowest_number_that_is_not_0_is_a_base_only_without_a_hole(
    tmp_path: Path, lowest: str
) -> None:
    write_numbered(tmp_path, [lowest])
    missing = "1 layer is" if lowest.startswith("1") else "3 layers are"
    for _ in read_catalog(str(tmp_path)).snapshots:
        with pytest.raises(BrokenChainError) as caught:
            open_image(tmp_path / lowest)
        assert f"{lowest}: has holes, and {missing} missing below it" in str(caught.value)
        assert "--allow-gaps" in str(caught.value)
    with open_image(tmp_path / lowest, TrustPolicy(allow_gaps=True)).view as view:
        assert view.read(0, SIZE) == overlay_oracle(SIZE, [pages(0, BASE_PAGES)])
    age(write_layer(tmp_path / lowest, SIZE, pages(7, range(16))))
    with open_image(tmp_path / lowest).view as view:
        assert view.read(0, SIZE) == overlay_oracle(SIZE, [pages(7, range(16))])


def test_a_number_that_is_0_is_a_base_with_all_its_holes(tmp_path: Path) -> None:
    age(write_layer(tmp_path / "0-base.mem", SIZE, pages(0, [3])))
    with open_image(tmp_path / "0-base.mem").view as view:
        assert view.read(0, SIZE) == overlay_oracle(SIZE, [pages(0, [3])])


@pytest.mark.slow
def test_every_verb_refuses_a_gap_and_accepts_it_if_told(tmp_path: Path) -> None:
    store = write_numbered(tmp_path / "s", ["000-base.mem", "001-a.mem", "003-b.mem"])
    image, whole = store / "003-b.mem", tmp_path / "whole"
    calls = [
        ("flatten", image, "-o", whole, "--force"),
        ("info", image),
        ("map", image),
        ("squash", image, "-o", tmp_path / "diff", "--force"),
        ("compare", image, image),
        ("rediff", store / "001-a.mem", image, "-o", tmp_path / "again", "--force"),
    ]
    for call in calls:
        assert "003-b.mem: 1 layer is missing" in mistake(3, *call)
        assert diffmergefs(*call, "--allow-gaps").returncode == 0
    expected = overlay_oracle(SIZE, [pages(0, BASE_PAGES), pages(1, [1]), pages(2, [2])])
    assert whole.read_bytes() == expected
    for call in [("verify", image), ("doctor", image)]:
        refused = diffmergefs(*call)
        assert (refused.returncode, "1 layer is missing" in refused.stdout) == (1, True)
        assert "missing" not in diffmergefs(*call, "--allow-gaps").stdout
    for told, states in ((False, ["complete", "complete", "broken"]), (True, ["complete"] * 3)):
        flags = ["--allow-gaps"] if told else []
        rows = {row["tag"]: row["state"] for row in listed(store, *flags)}
        assert [rows[tag] for tag in ("base", "a", "b")] == states
    explicit = diffmergefs("info", "--base", image, "--allow-gaps")
    assert (explicit.returncode, "goes with IMAGE" in explicit.stderr) == (2, True)


def listed(store: Path, *flags: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(succeed("list", "--json", store, *flags))
    return found


def test_two_memory_files_of_one_number_are_refused(tmp_path: Path) -> None:
    write_numbered(tmp_path, ["000-base.mem", "01-a.mem", "001-b.mem"])
    with pytest.raises(BrokenChainError, match=r"001-b\.mem and 01-a\.mem .* with the same number"):
        read_catalog(str(tmp_path))


def test_two_lowest_memory_files_with_different_suffixes_are_refused(tmp_path: Path) -> None:
    write_numbered(tmp_path, ["000-base.mem", "00-base.img"])
    with pytest.raises(BrokenChainError, match=r"with the same number.*--suffix"):
        read_catalog(str(tmp_path))
    assert chain(read_catalog(str(tmp_path), suffix=".img"), "base") == ["00-base.img"]


def test_one_stem_twice_is_refused(tmp_path: Path) -> None:
    write_numbered(tmp_path, ["000-base.mem", "001-a.mem", "002-a.mem"])
    with pytest.raises(BrokenChainError, match=r"001-a\.mem and 002-a\.mem .* with the same stem"):
        read_catalog(str(tmp_path))


def test_memory_files_have_the_suffix_of_the_lowest_one(tmp_path: Path) -> None:
    write_numbered(tmp_path, ["000-base.bin", "001-a.bin"], companions=["001-a.mem", "002-b.mem"])
    catalog = read_catalog(str(tmp_path))
    assert tags(catalog) == ["base", "a"]
    assert dict(catalog.snapshots["a"].files) == {"001-a.mem": "001-a.mem"}


@pytest.mark.parametrize("suffix", ["ram", ".ram"])
def test_a_given_suffix_with_and_without_dot(tmp_path: Path, suffix: str) -> None:
    write_numbered(tmp_path, ["000-base.ram", "001-a.ram"], companions=["000-base.mem"])
    catalog = read_catalog(str(tmp_path), suffix=suffix)
    assert chain(catalog, "a") == ["000-base.ram", "001-a.ram"]
    assert dict(catalog.snapshots["base"].files) == {"000-base.mem": "000-base.mem"}


def test_files_of_the_same_number_go_with_a_layer(tmp_path: Path) -> None:
    beside = ["000-base.vmstate", "00-other.state", "1-a.vmstate", "7-nobody.vmstate", "notes"]
    write_numbered(tmp_path, ["000-base.mem", "001-a.mem"], companions=beside)
    catalog = read_catalog(str(tmp_path))
    assert set(catalog.snapshots["base"].files) == {"000-base.vmstate", "00-other.state"}
    assert set(catalog.snapshots["a"].files) == {"1-a.vmstate"}
    assert catalog.snapshots["a"].folder is None


def test_a_changed_companion_is_another_state_of_its_tag(tmp_path: Path) -> None:
    write_numbered(tmp_path, ["000-base.mem"], companions=["000-base.vmstate"])
    before = read_catalog(str(tmp_path)).snapshots["base"]
    (tmp_path / "000-base.vmstate").write_text("longer than before, and new")
    after = read_catalog(str(tmp_path)).snapshots["base"]
    assert before.state != after.state
    assert before.newest_ns < after.newest_ns
    assert before.layer == after.layer


@pytest.mark.parametrize("suffix", [None, "bmap", ".mem"])
def test_a_seal_is_never_a_layer(tmp_path: Path, suffix: str | None) -> None:
    seals = ["000-base.mem.bmap", "001-a.mem.bmap"]
    write_numbered(tmp_path, ["000-base.mem", "001-a.mem"], companions=seals)
    catalog = read_catalog(str(tmp_path), "numbered", suffix)
    assert not {"base.mem", "a.mem"} & set(tags(catalog))
    if suffix != "bmap":
        assert tags(catalog) == ["base", "a"]
        assert set(seals) <= catalog.hidden


@pytest.mark.parametrize(
    "name",
    [
        "001-a.mem.tmp",
        "001-a.mem.part",
        ".001-a.mem.Xy12",
        ".diffmergefs-0.mem",
        "001-a",
        "a-001.mem",
        "-1-a.mem",
        "٣-a.mem",
        "001-.mem",
    ],
)
def test_temporary_and_other_names_are_never_layers(tmp_path: Path, name: str) -> None:
    write_numbered(tmp_path, ["000-base.mem", name])
    assert tags(read_catalog(str(tmp_path))) == ["base"]


def test_temporary_files_do_not_go_with_a_layer(tmp_path: Path) -> None:
    write_numbered(tmp_path, ["000-base.mem"], companions=["000-base.mem.tmp", "000-a.part"])
    assert not read_catalog(str(tmp_path)).snapshots["base"].files
    assert tags(read_catalog(str(tmp_path), "numbered", "tmp")) == []


@pytest.mark.parametrize("kind", ["symlink", "fifo"])
def test_what_is_no_regular_file_breaks_the_chain_and_is_not_skipped(
    tmp_path: Path, kind: str
) -> None:
    write_numbered(tmp_path, ["000-base.mem", "001-a.mem", "002-b.mem"])
    layer = tmp_path / "001-a.mem"
    layer.rename(tmp_path / "elsewhere")
    if kind == "symlink":
        layer.symlink_to("elsewhere")
    else:
        os.mkfifo(layer)
    catalog = read_catalog(str(tmp_path))
    assert len(catalog.chain("base")) == 1
    with pytest.raises(BrokenChainError, match=r"^001-a\.mem: is not a regular file"):
        catalog.chain("a")
    with pytest.raises(BrokenChainError, match=r"ancestor 'a' is broken: 001-a\.mem"):
        catalog.chain("b")


def test_both_layouts_in_one_directory_are_refused_unless_one_is_said(tmp_path: Path) -> None:
    write_numbered(tmp_path, ["000-base.mem"])
    write_tag(tmp_path, "native")
    with pytest.raises(BrokenChainError, match="--layout=forkd or --layout=numbered"):
        read_catalog(str(tmp_path))
    assert tags(read_catalog(str(tmp_path), "numbered")) == ["base"]
    assert tags(read_catalog(str(tmp_path), "forkd")) == ["native"]


def test_a_tag_named_like_a_numbered_layer_does_not_make_a_store_ambiguous(tmp_path: Path) -> None:
    write_tag(tmp_path, "000-base.mem")
    catalog = read_catalog(str(tmp_path))
    assert (catalog.layout, tags(catalog)) == ("forkd", ["000-base.mem"])


def test_an_empty_directory_has_no_snapshots(tmp_path: Path) -> None:
    assert tags(read_catalog(str(tmp_path))) == []
    assert tags(read_catalog(str(tmp_path), "numbered")) == []


def test_stems_that_are_hard_names_are_tags(tmp_path: Path) -> None:
    write_numbered(tmp_path, ["000-\udcff.mem", "001-a b\n.mem"])
    assert tags(read_catalog(str(tmp_path))) == ["\udcff", "a b\n"]


def test_what_could_be_memory_itself_does_not_go_with_a_layer(tmp_path: Path) -> None:
    write_numbered(tmp_path, ["000-base.mem", "001-a.mem"], companions=["001-a.img"])
    for name in ("001-a.bin", "001-a.raw"):
        write_layer(tmp_path / name, SIZE, pages(7, [7]))
    catalog = read_catalog(str(tmp_path))
    assert set(catalog.snapshots["a"].files) == {"001-a.img", "001-a.raw"}
    assert tags(catalog) == ["base", "a"]


@pytest.mark.slow
def test_many_numbered_files_are_compared_in_one_pass() -> None:
    # Comparing each with each would take hours.
    kinds = {f"{n}-t{n}.mem": stat.S_IFREG for n in range(200_000)}
    assert len(memory_files(kinds)) == 200_000
    with pytest.raises(BrokenChainError, match=r"0199999-x\.mem and 199999-t199999\.mem are"):
        memory_files(kinds | {"0199999-x.mem": stat.S_IFREG})
