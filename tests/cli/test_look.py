"""`list` and `info`: every state, number and field, as a table and as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs.analysis.info import describe
from diffmergefs.opening.images import open_image
from tests.support import loopfs
from tests.support.commands import (
    diffmergefs,
    diffmergefs_as_nobody,
    mistake,
    succeed,
    unsized,
)
from tests.support.images import PAGE, signed, write_layer
from tests.support.inputs import unchanged
from tests.support.stores import (
    BASE_PAGES,
    SIZE,
    age,
    pages,
    write_chain,
    write_document,
    write_numbered,
    write_tag,
)

LIST_FIELDS = {
    *("tag", "parent", "depth", "size", "dirty_bytes", "state", "pinned"),
    *("reason", "check", "remedy", "hints"),
}


@pytest.fixture
def store(real_fs: Path) -> Path:
    """Snapshots in every state that `list` knows."""
    write_chain(real_fs, ["base", "work"])
    full = write_tag(real_fs, "full", "work", layer=4, numbers=range(16)) / "memory.bin"
    write_layer(full, SIZE, [(0, signed(0, 0, SIZE)), *pages(4, range(12))])
    write_tag(real_fs, "on-full", "full", layer=5)
    filled = write_tag(real_fs, "holes-filled", "base", layer=6) / "memory.bin"
    filled.write_bytes(filled.read_bytes())
    write_tag(real_fs, "orphan", "nobody", layer=7)
    write_tag(real_fs, "invalid", "base", layer=8)
    write_document(real_fs, "invalid", "{")
    return real_fs


def cells(table: str) -> list[list[str]]:
    return [re.split("  +", unsized(line)) for line in table.splitlines()]


def listed(*arguments: str | Path) -> dict[str, dict[str, object]]:
    rows = json.loads(succeed("list", "--json", *arguments))
    return {row["tag"]: row for row in rows}


def test_list_has_one_line_a_snapshot_in_a_pipe(store: Path) -> None:
    layers = sorted(store.glob("*/memory.bin"))
    with unchanged(layers):
        header, *rows = cells(succeed("list", store))
    assert header == ["TAG", "PARENT", "DEPTH", "SIZE", "DIRTY", "STATE"]
    size, page = str(SIZE), str(PAGE)
    found = {row[0]: row[1:] for row in rows}
    assert len(rows) == 7
    assert found["base"] == ["-", "1", size, str(15 * PAGE), "complete"]
    assert found["work"] == ["base", "2", size, page, "complete, unpinned"]
    assert found["full"] == ["work", "3", size, size, "dense, unpinned"]
    assert found["on-full"] == ["full", "4", size, page, "complete, unpinned"]
    assert found["orphan"][:4] == ["nobody", "-", size, "-"]
    assert found["orphan"][4] == "broken: parent 'nobody' of 'orphan' is missing"
    assert found["holes-filled"][4].startswith("broken: holes-filled/memory.bin: looks like a diff")
    assert found["invalid"][4].startswith("broken: invalid/snapshot.json: not valid JSON")


def test_list_as_json_has_the_same_facts(store: Path) -> None:
    found = listed(store)
    assert list(found) == sorted(found)
    assert all(set(row) == LIST_FIELDS for row in found.values())
    assert found["work"] == {
        "tag": "work",
        "parent": "base",
        "depth": 2,
        "size": SIZE,
        "dirty_bytes": PAGE,
        "state": "complete",
        "pinned": False,
        "reason": None,
        "check": None,
        "remedy": None,
        "hints": [],
    }
    assert (found["base"]["parent"], found["base"]["pinned"]) == (None, None)
    assert (found["orphan"]["depth"], found["orphan"]["dirty_bytes"]) == (None, None)
    assert {row["state"] for row in found.values()} == {"complete", "dense", "broken"}


def test_list_tells_who_records_the_hash_of_its_parent(tmp_path: Path) -> None:
    write_chain(tmp_path, ["base", "free"])
    write_tag(tmp_path, "held", "base", layer=2, parent_content_hash="ab" * 32)
    write_tag(tmp_path, "lost", "nobody", layer=3, parent_content_hash="ab" * 32)
    pinned = {tag: row["pinned"] for tag, row in listed(tmp_path).items()}
    assert pinned == {"base": None, "free": False, "held": True, "lost": True}
    states = {row[0]: row[-1] for row in cells(succeed("list", tmp_path))[1:]}
    assert states["free"] == "complete, unpinned"
    # A hash is not compared by `list`, and nothing of it is said then.
    assert (states["base"], states["held"]) == ("complete", "complete")


def test_list_accepts_a_filled_diff_with_dense(store: Path) -> None:
    assert listed(store)["holes-filled"]["state"] == "broken"
    assert listed("--dense", store)["holes-filled"]["state"] == "dense"


def test_why_names_of_each_broken_tag_the_check_and_the_remedy(store: Path) -> None:
    table = succeed("list", store)
    text = succeed("list", "--why", store)
    assert text.startswith(table)
    blocks = [block.splitlines() for block in text.removeprefix(table).strip().split("\n\n")]
    found = {tag: [line.split(None, 1) for line in lines] for tag, *lines in blocks}
    known = listed(store)
    assert set(found) == {tag for tag, row in known.items() if row["state"] == "broken"}
    for tag, lines in found.items():
        assert [name for name, _ in lines] == ["check", "found", "remedy"]
        (_, check), (_, what), (_, remedy) = lines
        assert (check, remedy) == (known[tag]["check"], known[tag]["remedy"])
        assert known[tag]["reason"] in (what, f"{what}; {remedy}")
    assert {tag: row["check"] for tag, row in known.items() if row["check"]} == {
        "holes-filled": "dense",
        "orphan": "chain",
        "invalid": "chain",
    }


def test_why_names_what_is_refused_by_its_filesystem(filesystem: Callable[[str], Path]) -> None:
    place = filesystem("tmpfs_advise")
    write_chain(place, ["base", "work", "leaf"])
    rows = listed(place)
    assert [rows[tag]["state"] for tag in ("base", "work", "leaf")] == [
        "complete",
        "broken",
        "broken",
    ]
    assert rows["work"]["check"] == "filesystem"
    assert "--trust-grain=filesystem" in str(rows["work"]["remedy"])
    text = succeed("list", "--why", place)
    assert "\n\nwork\n  check    filesystem\n" in text
    done = diffmergefs("list", "--trust-grain=filesystem", "--why", place)
    assert (done.returncode, done.stderr.count("check of filesystem")) == (0, 3)
    assert "broken" not in done.stdout


def test_list_tells_what_trust_grain_overrides(tmp_path: Path) -> None:
    # With guest pages of 16 KiB a lone page of 4 KiB is a diff's sign of another grain.
    write_chain(tmp_path, ["base", "work"])
    assert listed(tmp_path)["work"]["state"] == "complete"
    refused = listed("--page-size=16384", tmp_path)["work"]
    assert refused["state"] == "broken"
    assert "does not begin and end on a page of 16384" in str(refused["reason"])
    done = diffmergefs("list", "--json", "--page-size=16384", "--trust-grain", tmp_path)
    assert json.loads(done.stdout)[1]["state"] == "complete"
    assert done.stderr.startswith("diffmergefs: --trust-grain overrides the check of alignment")
    assert done.stderr.count("\n") == 1


def test_list_of_numbered_layers_with_layout_and_suffix(tmp_path: Path) -> None:
    write_numbered(tmp_path, ["000-base.ram", "001-work.ram"], companions=["000-base.mem"])
    assert listed("--suffix", "ram", tmp_path)["work"]["depth"] == 2
    write_tag(tmp_path, "native")
    assert "--layout" in mistake(3, "list", "--suffix=ram", tmp_path)
    done = diffmergefs("list", "--json", "--layout=numbered", "--suffix=ram", tmp_path)
    assert {row["tag"] for row in json.loads(done.stdout)} == {"base", "work"}
    assert "/native: passed over: a snapshot of the layout forkd, which --layout" in done.stderr
    assert set(listed("--layout=forkd", tmp_path)) == {"native"}


def test_list_of_a_directory_without_snapshots_is_an_empty_list_and_says_so(tmp_path: Path) -> None:
    for arguments, lines in (
        (("--json",), ["[]"]),
        ((), ["TAG  PARENT  DEPTH  SIZE  DIRTY  STATE"]),
    ):
        done = diffmergefs("list", *arguments, tmp_path)
        assert (done.returncode, done.stdout.splitlines()) == (0, lines)
        assert done.stderr.startswith(f"diffmergefs: {tmp_path}: no snapshots: it is empty; ")
        assert "; looked for forkd (TAG/snapshot.json), numbered (000-TAG.mem), " in done.stderr
        assert done.stderr.count("\n") == 1
    for name in ("mem_file", "mem_diff", "snapshot_file"):
        write_layer(tmp_path / name, SIZE, [])
    done = diffmergefs("list", tmp_path)
    assert done.returncode == 0
    assert "files of Firecracker (mem_diff, mem_file, snapshot_file)" in done.stderr


def test_list_tells_what_it_passes_over(tmp_path: Path) -> None:
    write_chain(tmp_path, ["base", "work"])
    (tmp_path / "latest").symlink_to("work")
    (tmp_path / "scratch").mkdir()
    done = diffmergefs("list", "--json", tmp_path)
    assert [row["tag"] for row in json.loads(done.stdout)] == ["base", "work"]
    link, scratch = done.stderr.splitlines()
    assert link.startswith(f"diffmergefs: {tmp_path}/latest: passed over: a symlink to ")
    assert (
        scratch == f"diffmergefs: {tmp_path}/scratch: passed over: no snapshot of the layout forkd"
    )


def test_list_of_one_snapshot_names_its_parent_directory(tmp_path: Path) -> None:
    store = write_chain(tmp_path / "store", ["base", "work"])
    line = mistake(3, "list", store / "work")
    assert (
        "is one snapshot (layout forkd), not a directory of them; mount or list its parent " in line
    )
    assert line.endswith(f"parent directory, {store}\n")


def test_info_of_the_path_of_a_view_inside_a_store(tmp_path: Path) -> None:
    store = write_chain(tmp_path / "store", ["base", "work"])
    assert succeed("info", store / "work" / "memory.bin") == succeed("info", store / "work")
    layers = write_numbered(tmp_path / "layers", ["000-base.mem", "001-work.mem"])
    expected = succeed("info", layers / "001-work.mem")
    assert succeed("info", layers / "work") == expected
    assert succeed("info", layers / "work" / "001-work.mem") == expected


@pytest.mark.parametrize(
    "verb", ["info", "map", "flatten -o {new}", "squash -o {new}", "prefetch --show"]
)
def test_a_directory_of_snapshots_is_no_image_and_its_tags_are_named(
    verb: str, tmp_path: Path
) -> None:
    store = write_chain(tmp_path / "store", ["base", "work"])
    line = mistake(3, *verb.format(new=tmp_path / "new").split(), store)
    assert line == (
        f"diffmergefs: {store}: is a directory of 2 snapshots, not one of them; name one:"
        f" {store}/base, {store}/work\n"
    )
    assert not (tmp_path / "new").exists()


def test_list_through_a_symlink(tmp_path: Path) -> None:
    write_chain(tmp_path / "store", ["base", "work"])
    (tmp_path / "link").symlink_to("store")
    assert listed(tmp_path / "link") == listed(tmp_path / "store")


def test_info_tells_each_layers_share_of_the_view(store: Path) -> None:
    table, total = diffmergefs("info", store / "work").stdout.rsplit("\n", 2)[:2]
    header, *rows = cells(table)
    assert header == ["#", "LAYER", "DATA", "EXTENTS", "VISIBLE", "SHADOWED", "GRAIN", "TRUST"]
    grain = str(store.stat().st_blksize)
    numbers = map(str, (15 * PAGE, 1, 14 * PAGE, PAGE))
    base = ["0", f"{store}/base/memory.bin", *numbers, grain, "base"]
    work = ["1", f"{store}/work/memory.bin", *map(str, (PAGE, 1, PAGE, 0)), grain, "trusted"]
    assert rows == [base, work]
    assert unsized(total) == f"2 layers, {SIZE} bytes, of which {PAGE} are holes in all; 3 segments"


def test_info_as_json_has_the_same_facts(store: Path) -> None:
    found = json.loads(diffmergefs("info", "--json", store / "full").stdout)
    with (image := open_image(store / "full")).view:
        assert found == describe(image).as_dict()
    assert {key: found[key] for key in found if key != "layers"} == {
        "size": SIZE,
        "holes": 0,
        "segments": 1,
        "dense": True,
        "hints": [],
    }
    assert [layer["visible_bytes"] for layer in found["layers"]] == [0, 0, SIZE]
    assert [layer["shadowed_bytes"] for layer in found["layers"]] == [15 * PAGE, PAGE, 0]
    assert ", dense" in diffmergefs("info", store / "full").stdout


def test_info_of_explicit_and_of_numbered_layers(tmp_path: Path) -> None:
    write_numbered(tmp_path, ["000-base.mem", "001-a.mem", "002-b.mem"])
    base, diff = tmp_path / "000-base.mem", tmp_path / "001-a.mem"
    numbered = json.loads(succeed("info", "--json", diff))
    explicit = json.loads(succeed("info", "--json", "--base", base, "--diff", diff))
    assert [layer["path"] for layer in explicit["layers"]] == [str(base), str(diff)]
    for found in (numbered, explicit):
        assert [layer.pop("path")[-9:] for layer in found["layers"]] == ["-base.mem", "001-a.mem"]
    assert numbered == explicit


def test_info_of_an_image_named_by_a_symlink_or_from_within(tmp_path: Path) -> None:
    write_chain(tmp_path / "store", ["base", "work"])
    (tmp_path / "link").symlink_to("store/work")
    expected = succeed("info", tmp_path / "store" / "work")
    assert succeed("info", tmp_path / "link") == expected
    assert succeed("info", f"{tmp_path}/link/") == expected
    assert diffmergefs("info", ".", cwd=tmp_path / "store" / "work").stdout == expected


def test_info_of_an_explicit_dense_diff_needs_dense(tmp_path: Path) -> None:
    base = write_layer(tmp_path / "base", SIZE, pages(0, BASE_PAGES))
    diff = write_layer(tmp_path / "diff", SIZE, [(0, signed(1, 0, SIZE))])
    arguments = ("info", "--base", base, "--diff", diff)
    assert "--dense" in mistake(6, *arguments)
    done = diffmergefs(*arguments, "--dense")
    assert (done.returncode, ", dense" in done.stdout) == (0, True)
    assert f"{base}: the base has" in done.stderr  # nothing of it shows: is that the base?


def test_info_says_which_check_was_overridden(tmp_path: Path) -> None:
    write_chain(tmp_path, ["base", "work"])
    assert "--trust-grain" in mistake(5, "info", "--page-size=16384", tmp_path / "work")
    done = diffmergefs("info", "--page-size=16384", "--trust-grain", tmp_path / "work")
    assert done.returncode == 0
    assert cells(done.stdout)[2][-1] == "overridden: alignment"


def test_info_says_once_a_filesystem_that_readers_can_change_unsealed_diffs_on_tmpfs(
    filesystem: Callable[[str], Path], tmp_path: Path
) -> None:
    store = filesystem("tmpfs")
    write_chain(store, ["base", "work", "leaf"])
    (line,) = diffmergefs("info", "--json", store / "leaf").stderr.splitlines()
    sentence = "a diff without a seal on tmpfs: a process that maps it and reads a hole makes the"
    assert f"work/memory.bin: {sentence}" in line
    with loopfs.overlay(filesystem("tmpfs")) as layers:
        write_chain(layers.merged, ["base", "work"])
        assert sentence in diffmergefs("info", layers.merged / "work").stderr
    for tag in ("work", "leaf"):
        assert diffmergefs("seal", store / tag / "memory.bin").returncode == 0
    assert diffmergefs("info", store / "leaf").stderr == ""
    write_chain(tmp_path, ["base", "work"])
    assert diffmergefs("info", tmp_path / "work").stderr == ""


def test_a_filesystem_with_big_blocks_is_refused_with_its_grain(filesystem: object) -> None:
    assert callable(filesystem)
    store = filesystem("xfs16k")
    write_chain(store, ["base", "work"])
    age(store / "work" / "memory.bin")
    found = listed(store)
    assert found["base"]["state"] == "complete"
    assert "units of 16384 bytes" in str(found["work"]["reason"])


def test_list_tells_the_parent_of_a_broken_snapshot(tmp_path: Path) -> None:
    write_tag(tmp_path, "base")
    write_tag(tmp_path, "no tag", "base", layer=1)
    write_tag(tmp_path, "stateless", "base", layer=2)
    (tmp_path / "stateless" / "vmstate").unlink()
    found = listed(tmp_path)
    for tag, text in (("no tag", "is not a legal tag"), ("stateless", "vmstate")):
        assert (found[tag]["parent"], found[tag]["size"]) == ("base", SIZE)
        assert found[tag]["state"] == "broken" and text in str(found[tag]["reason"])


def test_what_a_user_may_not_look_into_is_told_and_spoils_nothing(public_path: Path) -> None:
    """Every ext4 has a lost+found."""
    write_numbered(public_path / "numbered", ["000-base.mem", "001-a.mem"])
    write_chain(public_path / "store", ["base", "work"])
    for folder in ("numbered", "store"):
        (public_path / folder / "lost+found").mkdir(mode=0o700)
    done = diffmergefs_as_nobody("list", public_path / "numbered")
    assert (done.returncode, done.stderr) == (0, "")
    assert [row[0] for row in cells(done.stdout)] == ["TAG", "a", "base"]
    done = diffmergefs_as_nobody("list", public_path / "store")
    assert (done.returncode, done.stderr) == (0, "")
    states = {row[0]: row[-1] for row in cells(done.stdout)}
    assert states["lost+found"] == "broken: lost+found: Permission denied"
    assert (states["base"], states["work"]) == ("complete", "complete, unpinned")
