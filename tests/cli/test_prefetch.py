"""`prefetch`: what is recorded of an image, and how to be rid of it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from diffmergefs.prefetch.push import pieces
from diffmergefs.prefetch.record import WorkingSet, WorkingSets, identity_of_files, now
from tests.support.commands import diffmergefs, mistake, one_line, succeed
from tests.support.images import PAGE
from tests.support.restores import SIZE, ranges_of, scattered
from tests.support.stores import write_numbered, write_tag

TOUCHED = scattered(20)
USAGE, NO, BROKEN, UNREADABLE = 2, 1, 3, 14


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_tag(tmp_path / "store", "base", size=SIZE)
    write_tag(tmp_path / "store", "leaf", "base", layer=1, size=SIZE)
    return tmp_path / "store"


@pytest.fixture
def sets(tmp_path: Path) -> WorkingSets:
    return WorkingSets(str(tmp_path / "sets"))


def files(store: Path) -> list[str]:
    return [str(store / tag / "memory.bin") for tag in ("base", "leaf")]


def record(sets: WorkingSets, paths: list[str], readahead: int | None = 4) -> str:
    layers = identity_of_files(paths)
    return sets.save(WorkingSet(layers, tuple(ranges_of(TOUCHED)), now(), readahead))


def test_show_says_what_is_recorded(store: Path, sets: WorkingSets) -> None:
    path = record(sets, files(store))
    text = succeed("prefetch", store / "leaf", "--show", "--working-set-dir", sets.directory)
    words = [line.split(None, 1) for line in text.splitlines()]
    size, wanted = len(TOUCHED) * PAGE, pieces(ranges_of(TOUCHED), SIZE)
    assert [name for name, _ in words[:2]] == ["record", "recorded"]
    assert dict(words) == {
        "record": path,
        "recorded": words[1][1],
        "readahead": "4 KiB",
        "state": "fits",
        "touched": f"{size} bytes (80 KiB) in {len(TOUCHED)} ranges",
        "prefetched": f"{size} bytes (80 KiB) in {len(wanted)} pieces",
    }


def test_show_as_json_has_the_ranges_in_order(store: Path, sets: WorkingSets) -> None:
    path = record(sets, files(store), readahead=None)
    options = ["--json", "--show", "--working-set-dir", sets.directory]
    facts = json.loads(succeed("prefetch", store / "leaf", *options))
    assert re.fullmatch(r"20\d\d-.*\+00:00", facts.pop("recorded"))
    assert facts == {
        "record": path,
        "readahead_kib": None,
        "stale": None,
        "touched_bytes": len(TOUCHED) * PAGE,
        "prefetched_bytes": len(TOUCHED) * PAGE,
        "pieces": len(pieces(ranges_of(TOUCHED), SIZE)),
        "layers": files(store),
        "ranges": [[start, stop] for start, stop in ranges_of(TOUCHED)],
    }


def test_without_a_record_the_answer_is_no(store: Path, sets: WorkingSets) -> None:
    where = ["--working-set-dir", sets.directory]
    line = mistake(NO, "prefetch", store / "leaf", "--show", *where)
    assert "there is no record; `mount --record` makes one" in line
    done = diffmergefs("prefetch", store / "leaf", "--show", "--json", *where)
    assert (done.returncode, json.loads(done.stdout)) == (NO, {"record": None})
    # One of another chain is none of this one.
    record(sets, files(store)[:1])
    assert diffmergefs("prefetch", store / "leaf", "--show", *where).returncode == NO
    assert diffmergefs("prefetch", store / "base", "--show", *where).returncode == 0


def test_a_stale_record_is_shown_as_such(store: Path, sets: WorkingSets) -> None:
    record(sets, files(store))
    os.utime(files(store)[0])
    where = ["--working-set-dir", sets.directory]
    done = diffmergefs("prefetch", store / "leaf", "--show", *where)
    assert done.returncode == NO and f"stale: {files(store)[0]}: another file" in done.stdout
    done = diffmergefs("prefetch", store / "leaf", "--show", "--json", *where)
    assert done.returncode == NO and json.loads(done.stdout)["stale"].startswith(files(store)[0])


@pytest.mark.parametrize("damaged", [False, True])
def test_forget_removes_the_record(damaged: bool, store: Path, sets: WorkingSets) -> None:
    path = Path(record(sets, files(store)))
    if damaged:
        path.write_bytes(b"damaged")
    where = ["--working-set-dir", sets.directory]
    assert succeed("prefetch", store / "leaf", "--forget", *where) == f"{path}: removed\n"
    assert not path.exists()
    done = diffmergefs("prefetch", store / "leaf", "--forget", *where)
    assert "there is no record" in one_line(done, 0)
    facts = json.loads(succeed("prefetch", store / "leaf", "--forget", "--json", *where))
    assert facts == {"record": str(path), "forgotten": False}


def test_a_damaged_record_is_one_line(store: Path, sets: WorkingSets) -> None:
    path = Path(record(sets, files(store)))
    path.write_bytes(b"damaged")
    where = ["--working-set-dir", sets.directory]
    line = mistake(UNREADABLE, "prefetch", store / "leaf", "--show", *where)
    assert str(path) in line and "--forget removes it" in line


def test_each_way_to_name_an_image(tmp_path: Path, store: Path, sets: WorkingSets) -> None:
    numbered = write_numbered(tmp_path / "layers", ["000-a.mem", "001-b.mem"], SIZE)
    layers = [str(numbered / name) for name in ("000-a.mem", "001-b.mem")]
    record(sets, layers)
    where = ["--show", "--working-set-dir", sets.directory]
    succeed("prefetch", numbered / "001-b.mem", *where)
    succeed("prefetch", "--base", layers[0], "--diff", layers[1], *where)
    link = tmp_path / "link"
    link.symlink_to(numbered)
    succeed("prefetch", link / "001-b.mem", *where)


def test_the_state_directory_holds_them_too(tmp_path: Path, store: Path) -> None:
    record(WorkingSets(state_dir=str(tmp_path / "state")), files(store))
    succeed("prefetch", store / "leaf", "--show", "--state-dir", tmp_path / "state")


def test_no_layer_is_opened(store: Path, sets: WorkingSets) -> None:
    """Not even one that is being written."""
    record(sets, files(store))
    with open(files(store)[1], "r+b"):
        succeed("prefetch", store / "leaf", "--show", "--working-set-dir", sets.directory)


@pytest.mark.parametrize("arguments", [["--show", "--forget"], []], ids=str)
def test_one_of_both_is_wanted(arguments: list[str], store: Path) -> None:
    done = diffmergefs("prefetch", store / "leaf", *arguments)
    assert done.returncode == USAGE and "give either --show or --forget" in done.stderr


def test_mistakes_are_one_line(store: Path, tmp_path: Path) -> None:
    assert "No such file" in mistake(UNREADABLE, "prefetch", tmp_path / "gone", "--show")
    write_tag(store, "orphan", "missing", layer=3, size=SIZE)
    assert "missing" in mistake(BROKEN, "prefetch", store / "orphan", "--show")
    line = mistake(UNREADABLE, "prefetch", "--base", tmp_path / "gone", "--forget")
    assert f"{tmp_path}/gone: No such file or directory" in line
