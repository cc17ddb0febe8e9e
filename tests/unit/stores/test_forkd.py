"""forkd's store: each field of snapshot.json, where paths are looked for, what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from diffmergefs.core.errors import BrokenChainError, UntrustedExtentsError
from diffmergefs.opening import trust
from diffmergefs.opening.images import open_image
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.stores.catalog import read_catalog
from diffmergefs.stores.snapshot import Snapshot
from diffmergefs.writing.sealing import seal_layer
from tests.support.commands import diffmergefs, mistake, succeed
from tests.support.images import PAGE, overlay_oracle, write_layer
from tests.support.stores import BASE_PAGES, SIZE, pages, write_chain, write_document, write_tag

HASH = "0123456789abcdef" * 4
TOO_MANY = "over 32768 strings, objects, arrays and commas"


def read(store: Path, tag: str) -> Snapshot:
    return read_catalog(str(store)).snapshots[tag]


def problem(store: Path, tag: str) -> str:
    """Why the tag is broken: one line, the same for the tag and for its chain."""
    catalog = read_catalog(str(store))
    found = catalog.snapshots[tag].problem
    assert found is not None
    assert "\n" not in found
    with pytest.raises(BrokenChainError) as caught:
        catalog.chain(tag)
    assert str(caught.value) == found
    return found


def test_every_field_of_a_document_is_read(tmp_path: Path) -> None:
    write_tag(tmp_path, "base")
    write_tag(
        tmp_path, "work", "base", layer=1, parent_content_hash=HASH, volumes=[{"a": 1}], rootfs="/r"
    )
    found = read(tmp_path, "work")
    assert (found.tag, found.parent, found.parent_hash) == ("work", "base", HASH)
    assert found.layer.path == "work/memory.bin"
    assert (found.folder, found.vmstate) == ("work", "vmstate")
    assert dict(found.files) == {"vmstate": "work/vmstate"}
    assert found.document is not None
    assert (found.document["volumes"], found.document["rootfs"]) == ([{"a": 1}], "/r")
    assert found.problem is None


def test_a_chain_reads_as_its_layers_laid_one_after_another(tmp_path: Path) -> None:
    write_chain(tmp_path, ["base", "numpy", "pandas"])
    layers = [pages(0, BASE_PAGES), pages(1, [1]), pages(2, [2])]
    with open_image(tmp_path / "pandas").view as view:
        assert view.read(0, SIZE) == overlay_oracle(SIZE, layers)


def test_only_memory_is_required_of_a_document(tmp_path: Path) -> None:
    write_tag(tmp_path, "base", vmstate=None)
    found = read(tmp_path, "base")
    assert (found.problem, found.parent, found.vmstate) == (None, None, None)


def test_a_parent_tag_of_null_is_a_base(tmp_path: Path) -> None:
    write_tag(tmp_path, "base")
    write_document(tmp_path, "base", '{"memory": "memory.bin", "parent_tag": null}')
    assert read(tmp_path, "base").parent is None
    assert len(read_catalog(str(tmp_path)).chain("base")) == 1


def test_a_directory_without_a_document_is_a_base_if_it_has_both_files(tmp_path: Path) -> None:
    for tag in ("both", "one"):
        (tmp_path / tag).mkdir()
        write_layer(tmp_path / tag / "memory.bin", SIZE, pages(0, BASE_PAGES))
    (tmp_path / "both" / "vmstate").touch()
    (tmp_path / "unrelated").mkdir()
    (tmp_path / "file").touch()
    catalog = read_catalog(str(tmp_path))
    assert set(catalog.snapshots) == {"both"}
    assert catalog.chain("both")[0].layer.path == "both/memory.bin"


def test_staging_directories_are_no_tags(tmp_path: Path) -> None:
    write_chain(tmp_path, [".compact-staging-base", "base"])
    assert set(read_catalog(str(tmp_path)).snapshots) == {"base"}


@pytest.mark.parametrize("tag", ["a", "_-", "v1.2+cpu", "x" * 64])
def test_legal_tags_are_complete(tmp_path: Path, tag: str) -> None:
    write_tag(tmp_path, tag)
    assert read(tmp_path, tag).problem is None


@pytest.mark.parametrize("tag", [".a", "a.", "+", "x" * 65, "a b", "é", "a\n", "\udcff", "[red]"])
def test_illegal_tags_are_listed_as_broken(tmp_path: Path, tag: str) -> None:
    write_tag(tmp_path, tag)
    assert "is not a legal tag" in problem(tmp_path, tag)


def test_a_stale_absolute_path_is_found_by_its_name_in_the_tags_directory(tmp_path: Path) -> None:
    write_tag(tmp_path, "base", memory="mem", vmstate="state")
    write_document(tmp_path, "base", '{"memory": "/gone/x/mem", "vmstate": "/gone/y/state"}')
    found = read(tmp_path, "base")
    assert found.layer.path == "base/mem"
    assert found.files == {"state": "base/state"}


@pytest.mark.parametrize("as_given", [True, False])
def test_a_path_beneath_source_is_found_as_given_and_as_realpath(
    tmp_path: Path, as_given: bool
) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    write_tag(real, "base")
    (real / "shared").mkdir()
    (real / "base" / "memory.bin").rename(real / "shared" / "big.mem")
    link.symlink_to(real)
    recorded = (link if as_given else real) / "shared" / "big.mem"
    write_document(real, "base", json.dumps({"memory": str(recorded)}))
    assert read(link, "base").layer.path == "shared/big.mem"


@pytest.mark.parametrize("name", ["memory.bin", "vmstate"])
def test_files_that_lie_outside_of_the_tags_directory_belong_to_its_state(
    tmp_path: Path, name: str
) -> None:
    write_tag(tmp_path, "base")
    (tmp_path / "shared").mkdir()
    moved = (tmp_path / "base" / name).rename(tmp_path / "shared" / name)
    where = {field: str(tmp_path / "base" / field) for field in ("memory.bin", "vmstate")}
    where[name] = str(moved)
    write_document(
        tmp_path, "base", json.dumps({"memory": where["memory.bin"], "vmstate": where["vmstate"]})
    )
    before = read(tmp_path, "base")
    os.utime(moved)
    after = read(tmp_path, "base")
    assert before.problem is None
    assert before.state != after.state
    assert before.newest_ns < after.newest_ns


def test_a_recorded_path_that_leads_nowhere_is_refused_by_its_name(tmp_path: Path) -> None:
    write_tag(tmp_path / "store", "base")
    outside = write_layer(tmp_path / "other.mem", SIZE, pages(0, [0]))
    write_document(tmp_path / "store", "base", json.dumps({"memory": str(outside)}))
    assert repr(str(outside)) in problem(tmp_path / "store", "base")


def test_a_directory_whose_name_only_begins_like_source_is_not_beneath_it(tmp_path: Path) -> None:
    write_tag(tmp_path / "store", "base")
    (tmp_path / "store" / "2").mkdir()
    (tmp_path / "store-2").mkdir()
    write_layer(tmp_path / "store" / "2" / "other.mem", SIZE, pages(0, [0]))
    outside = write_layer(tmp_path / "store-2" / "other.mem", SIZE, pages(0, [0]))
    write_document(tmp_path / "store", "base", json.dumps({"memory": str(outside)}))
    assert "is neither in 'base'" in problem(tmp_path / "store", "base")


def test_two_different_files_for_one_recorded_path_are_refused(tmp_path: Path) -> None:
    write_tag(tmp_path, "base")
    (tmp_path / "shared").mkdir()
    other = write_layer(tmp_path / "shared" / "memory.bin", SIZE, pages(3, [0]))
    write_document(tmp_path, "base", json.dumps({"memory": str(other)}))
    text = problem(tmp_path, "base")
    assert "base/memory.bin" in text and "shared/memory.bin" in text
    other.unlink()
    os.link(tmp_path / "base" / "memory.bin", other)
    assert read(tmp_path, "base").problem is None


def test_a_vmstate_that_is_recorded_and_missing_is_refused(tmp_path: Path) -> None:
    write_tag(tmp_path, "base")
    (tmp_path / "base" / "vmstate").unlink()
    assert "vmstate" in problem(tmp_path, "base")


def test_memory_and_vmstate_of_one_name_are_refused(tmp_path: Path) -> None:
    write_tag(tmp_path, "base")
    write_document(tmp_path, "base", '{"memory": "memory.bin", "vmstate": "memory.bin"}')
    assert "have the same name" in problem(tmp_path, "base")


@pytest.mark.parametrize("recorded", ["../base/memory.bin", "/x/../memory.bin", "..", "", "mem/"])
def test_paths_that_climb_or_name_nothing_are_refused(tmp_path: Path, recorded: str) -> None:
    write_tag(tmp_path, "base")
    write_document(tmp_path, "base", json.dumps({"memory": recorded}))
    assert "does not name a file in the store" in problem(tmp_path, "base")


def test_no_symlink_inside_source_is_followed(tmp_path: Path) -> None:
    store = tmp_path / "store"
    for tag in ("file", "document", "folder"):
        write_tag(store, tag)
    (store / "file" / "memory.bin").rename(tmp_path / "out.mem")
    (store / "file" / "memory.bin").symlink_to(tmp_path / "out.mem")
    (store / "document" / "snapshot.json").rename(tmp_path / "out.json")
    (store / "document" / "snapshot.json").symlink_to(tmp_path / "out.json")
    (store / "linked").symlink_to(tmp_path)
    write_document(store, "folder", json.dumps({"memory": str(store / "linked" / "out.mem")}))
    (store / "folder" / "memory.bin").rename(store / "folder" / "elsewhere")
    (store / "tag").symlink_to(store / "file")
    assert "is not a regular file" in problem(store, "file")
    assert "snapshot.json" in problem(store, "document")
    assert "is neither in 'folder'" in problem(store, "folder")
    assert "tag" not in read_catalog(str(store)).snapshots


@pytest.mark.parametrize("name", ["memory.bin", "vmstate", "snapshot.json"])
def test_a_fifo_is_refused_and_does_not_block(tmp_path: Path, name: str) -> None:
    write_tag(tmp_path, "base")
    (tmp_path / "base" / name).unlink()
    os.mkfifo(tmp_path / "base" / name)
    text = problem(tmp_path, "base")
    assert f"base/{name}" in text and ("regular file" in text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"memory": "memory.bin"', "not valid JSON"),
        (b'{"memory": "\xff"}', "not valid JSON"),
        ("", "not valid JSON"),
        ('{"memory": "memory.bin", "x": NaN}', "NaN"),
        ('{"memory": "memory.bin", "x": -Infinity}', "Infinity"),
        ('{"memory": "memory.bin", "memory": "vmstate"}', "'memory' appears twice"),
        ('{"memory": "memory.bin", "x": [{"y": 1, "y": 1}]}', "'y' appears twice"),
        ("[" * 20_000, "not valid JSON"),
        ('{"a":' * 10_000, "not valid JSON"),
        ("[" * 100_000, TOO_MANY),
        ('{"memory": "memory.bin", "x": [' + "[]," * 33_000 + "0]}", TOO_MANY),
        ('{"memory": "memory.bin", "x": [' + "0," * 33_000 + "0]}", TOO_MANY),
        ('{"memory": "memory.bin", "x": [' + '"",' * 17_000 + "0]}", TOO_MANY),
        ('"" ' * 33_000, TOO_MANY),
        ('"' + "\\" * 999_999, "not valid JSON"),
        ('"' + '\\"' * 500_000, "not valid JSON"),
        ('{"memory": "memory.bin", "x": ' + "[" * 200 + "]" * 200 + "}", "nested more than"),
        ('{"memory": "memory.bin"}' + " " * (1 << 20), "too large"),
        ("[]", "holds a list"),
        ("null", "holds a NoneType"),
        ("{}", "'memory' is missing"),
        ('{"memory": null}', "'memory' is missing"),
        ('{"memory": 7}', "'memory' is a int"),
        ('{"memory": ["memory.bin"]}', "'memory' is a list"),
        ('{"memory": "a\\u0000b"}', "does not name a file"),
        ('{"memory": "\\ud800"}', "surrogates not allowed"),
        ('{"memory": "memory.bin", "vmstate": false}', "'vmstate' is a bool"),
        ('{"memory": "memory.bin", "parent_tag": 1}', "'parent_tag' is a int"),
        ('{"memory": "memory.bin", "parent_tag": "\\udfff"}', "surrogates not allowed"),
        ('{"memory": "memory.bin", "parent_tag": "p", "parent_content_hash": 1}', "is a int"),
        ('{"memory": "memory.bin", "parent_tag": "p", "parent_content_hash": "ab"}', "sha256"),
        (json.dumps({"memory": "memory.bin", "parent_content_hash": HASH}), "without a parent"),
    ],
)
def test_documents_that_are_refused(tmp_path: Path, text: str | bytes, reason: str) -> None:
    write_tag(tmp_path, "base")
    write_document(tmp_path, "base", text)
    found = problem(tmp_path, "base")
    assert reason in found
    assert "base/snapshot.json" in found
    assert len(found) < 300


def test_commas_and_brackets_in_strings_are_no_values(tmp_path: Path) -> None:
    write_tag(tmp_path, "base", rootfs=',[{\\"' * 50_000)
    assert read(tmp_path, "base").problem is None


def test_equal_documents_are_kept_once_and_only_what_is_known_of_them(tmp_path: Path) -> None:
    write_tag(tmp_path, "base", vmstate=None)
    write_document(tmp_path, "base", '{"memory": "memory.bin", "volumes": ["v"], "x": [1]}')
    for number in range(3):
        write_tag(tmp_path, f"link-{number}", vmstate=None)
        document = tmp_path / f"link-{number}" / "snapshot.json"
        document.unlink()
        os.link(tmp_path / "base" / "snapshot.json", document)
    catalogs = [read_catalog(str(tmp_path)) for _ in range(2)]
    documents = [s.document for catalog in catalogs for s in catalog.snapshots.values()]
    assert len(documents) == 8
    assert documents[0] == {"memory": "memory.bin", "volumes": ["v"]}
    assert all(document is documents[0] for document in documents)
    # It is what was read, and never what stood there before.
    write_document(tmp_path, "base", '{"memory": "memory.bin", "volumes": ["w"]}')
    assert read(tmp_path, "base").document == {"memory": "memory.bin", "volumes": ["w"]}


def test_one_broken_document_leaves_the_others_complete(tmp_path: Path) -> None:
    write_chain(tmp_path, ["base", "work"])
    write_tag(tmp_path, "bad")
    write_document(tmp_path, "bad", '{"memory": "\\ud800"}')
    catalog = read_catalog(str(tmp_path))
    assert [link.tag for link in catalog.chain("work")] == ["base", "work"]


def test_an_uppercase_hash_is_the_same_hash(tmp_path: Path) -> None:
    write_tag(tmp_path, "base")
    write_tag(tmp_path, "work", "base", parent_content_hash=HASH.upper())
    assert read(tmp_path, "work").parent_hash == HASH


def test_an_illegal_tag_keeps_its_parent_and_its_layer_hidden(tmp_path: Path) -> None:
    write_tag(tmp_path, "base")
    write_tag(tmp_path, "no tag", "base", layer=1)
    catalog = read_catalog(str(tmp_path))
    assert catalog.snapshots["no tag"].parent == "base"
    assert {"no tag/memory.bin", "no tag/memory.bin.bmap"} <= catalog.hidden


@pytest.mark.parametrize(
    "fields",
    [
        {"vmstate": "missing"},
        {"vmstate": 7},
        {"vmstate": "memory.bin"},
        {"parent_content_hash": "ab"},
    ],
)
def test_a_bad_document_keeps_the_parent_and_the_layer_hidden(
    tmp_path: Path, fields: dict[str, object]
) -> None:
    write_tag(tmp_path, "base")
    write_tag(tmp_path, "work", "base", layer=1)
    document = {"memory": "memory.bin", "parent_tag": "base"} | fields
    write_document(tmp_path, "work", json.dumps(document))
    assert problem(tmp_path, "work")
    catalog = read_catalog(str(tmp_path))
    assert catalog.snapshots["work"].parent == "base"
    assert "work/memory.bin" in catalog.hidden


@pytest.mark.parametrize("memory", [None, 7, "missing"])
def test_a_tag_without_a_memory_file_keeps_its_parent(tmp_path: Path, memory: object) -> None:
    write_tag(tmp_path, "work")
    write_document(tmp_path, "work", json.dumps({"memory": memory, "parent_tag": "nobody"}))
    # Its own defect, although its parent is missing too.
    assert "memory" in problem(tmp_path, "work") or "missing" in problem(tmp_path, "work")
    assert "nobody" not in problem(tmp_path, "work")
    assert read(tmp_path, "work").parent == "nobody"


# A tag without its document: is it a base?


def undocumented(store: Path, tag: str = "late", numbers: Iterable[int] = (3,)) -> Path:
    folder = write_tag(store, tag, layer=5, numbers=numbers)
    (folder / "snapshot.json").unlink()
    return folder


def test_a_file_with_holes_and_without_a_document_is_refused_with_the_remedy(
    tmp_path: Path,
) -> None:
    folder = undocumented(tmp_path)
    write_tag(tmp_path, "child", "late", layer=1)
    for tag in ("late", "child"):
        with pytest.raises(BrokenChainError) as caught:
            open_image(tmp_path / tag)
        assert str(caught.value) == (
            f"{folder}/memory.bin: has holes, and without a snapshot.json nothing tells a base from"
            " a diff; wait for late/snapshot.json, or, if it is a base, write"
            ' {"memory": "memory.bin"} to it'
        )
    write_document(tmp_path, "late", '{"memory": "memory.bin"}')
    with open_image(tmp_path / "child").view as view:
        assert view.read(0, SIZE) == overlay_oracle(SIZE, [pages(5, [3]), pages(1, [1])])


@pytest.mark.slow
def test_every_verb_refuses_a_file_with_holes_and_without_a_document(tmp_path: Path) -> None:
    folder, out = undocumented(tmp_path / "s"), tmp_path / "out"
    calls = [
        ("info", folder),
        ("map", folder),
        ("flatten", folder, "-o", out),
        ("compare", folder, folder),
        ("rediff", "--store", tmp_path / "s", "-o", out),
    ]
    for call in calls:
        assert "late/memory.bin: has holes, and without a" in mistake(3, *call)
    for call in [("verify", folder), ("doctor", folder), ("doctor", tmp_path / "s")]:
        done = diffmergefs(*call)
        assert (done.returncode, "has holes, and without a" in done.stdout) == (1, True)
        assert "its holes are zeros" not in done.stdout
    [row] = json.loads(succeed("list", "--json", tmp_path / "s"))
    assert (row["state"], "has holes" in row["reason"]) == ("broken", True)


def test_a_seal_says_whether_a_file_without_a_document_has_holes(tmp_path: Path) -> None:
    # As squashfs and cp --sparse=always leave a base: with a hole for what it had as zeros.
    whole = [*pages(5, range(1, 16)), (0, bytes(PAGE))]
    sealed = tmp_path / "sealed" / "memory.bin"
    undocumented(tmp_path, "sealed")
    write_layer(sealed, SIZE, whole)
    seal_layer(sealed, policy=TrustPolicy(dense=True))
    write_layer(sealed, SIZE, whole[:-1])
    with open_image(tmp_path / "sealed").view as view:
        assert view.read(0, SIZE) == overlay_oracle(SIZE, [whole])
    diff = undocumented(tmp_path, "diff") / "memory.bin"
    seal_layer(diff)
    diff.write_bytes(diff.read_bytes())
    with pytest.raises(BrokenChainError, match="has holes"):
        open_image(tmp_path / "diff")


def test_where_holes_cannot_be_told_it_takes_a_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = undocumented(tmp_path, numbers=range(16))
    monkeypatch.setattr(trust, "untrusted_filesystem", lambda fd: "the extents are not to be had")
    with pytest.raises(UntrustedExtentsError) as caught:
        open_image(folder)
    assert "late/memory.bin: may have holes, and without a snapshot.json" in str(caught.value)
    assert len(open_image(folder, TrustPolicy(trust_grain={"all"})).overridden) == 1
    write_document(tmp_path, "late", '{"memory": "memory.bin"}')
    assert not open_image(folder).overridden
