"""Records of working sets: their format, who may write them, and when they are stale."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest

from diffmergefs import open_chain
from diffmergefs.core.errors import FileAccessError
from diffmergefs.core.extents import Extent
from diffmergefs.prefetch.record import (
    MAX_RANGES,
    Identity,
    LayerFile,
    WorkingSet,
    WorkingSets,
    decode,
    encode,
    identity_of_files,
    identity_of_view,
    now,
)
from diffmergefs.sidecars import verified
from tests.support.images import PAGE, write_layer
from tests.support.places import DOCS
from tests.support.stores import pages

LAYERS: Identity = (
    LayerFile("/images/base.mem", 2**63 + 5, 64 * PAGE + 10, 1_600_000_000_000_000_001),
    LayerFile("/images/\udcff\n.mem", 6, 64 * PAGE + 10, 0),
)
RANGES = (Extent(8 * PAGE, 9 * PAGE), Extent(0, 2 * PAGE), Extent(64 * PAGE, 64 * PAGE + 10))
RECORD = WorkingSet(LAYERS, RANGES, "2026-11-25T09:30:00+00:00", 4)
DOCUMENT: dict[str, Any] = json.loads(encode(RECORD))


@pytest.fixture
def sets(tmp_path: Path) -> WorkingSets:
    return WorkingSets(str(tmp_path / "state" / "sets"))


def test_a_record_is_read_as_it_was_written() -> None:
    assert decode(encode(RECORD)) == RECORD
    unknown = WorkingSet(LAYERS[:1], (), now(), None)
    assert decode(encode(unknown)) == unknown
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", now())
    assert RECORD.touched_bytes == 3 * PAGE + 10


def test_the_documented_format_is_the_one() -> None:
    page = DOCS / "diffmergefs-prefetch.md"
    (text,) = re.findall(r"```json\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    record = decode(text.encode())
    assert record.ranges == ((7065600, 7069696), (0, 8192))
    assert record.layers[1].path == "/srv/snapshots/numpy/memory.bin"
    assert json.loads(encode(record)) == json.loads(text)


def test_unknown_fields_are_ignored() -> None:
    assert decode(json.dumps(DOCUMENT | {"more": [1]}).encode()) == RECORD


BAD_RANGES = {
    "reversed": [PAGE, 0],
    "empty": [PAGE, PAGE],
    "negative": [-PAGE, PAGE],
    "beyond the end": [0, 65 * PAGE],
    "not on a page": [10, PAGE],
    "ends within a page": [0, 10],
    "three numbers": [0, PAGE, PAGE],
    "a boolean": [False, PAGE],
    "a float": [0.0, PAGE],
    "text": "ab",
    "a number": 7,
}
BAD = {
    "nothing": b"",
    "not JSON": b"{",
    "not ASCII": b'{"format": "\xc3\xa4"}',
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "a huge number": b'{"version": ' + b"9" * 10_000 + b"}",
    "another format": DOCUMENT | {"format": "other"},
    "a later version": DOCUMENT | {"version": 2},
    "version true": DOCUMENT | {"version": True},
    "no layers": DOCUMENT | {"layers": []},
    "too many layers": DOCUMENT | {"layers": DOCUMENT["layers"] * 501},
    "a layer of text": DOCUMENT | {"layers": ["/images/base.mem"]},
    "a layer without inode": DOCUMENT | {"layers": [{"path": "/a", "size": 1, "mtime_ns": 1}]},
    "no ranges": {k: v for k, v in DOCUMENT.items() if k != "ranges"},
    "too many ranges": DOCUMENT | {"ranges": [[0, PAGE]] * (MAX_RANGES + 1)},
    "twice": DOCUMENT | {"ranges": [[0, 2 * PAGE], [PAGE, 3 * PAGE]]},
    "no time": DOCUMENT | {"recorded": 7},
    "readahead of text": DOCUMENT | {"readahead_kib": "4"},
} | {f"range: {name}": DOCUMENT | {"ranges": [pair]} for name, pair in BAD_RANGES.items()}


@pytest.mark.parametrize("name", BAD)
def test_anything_else_is_refused_in_one_line(name: str, sets: WorkingSets) -> None:
    text = BAD[name] if isinstance(BAD[name], bytes) else json.dumps(BAD[name]).encode()
    assert isinstance(text, bytes)
    with pytest.raises(ValueError, match=r"\w") as caught:
        decode(text)
    assert "\n" not in str(caught.value)
    path = Path(sets.save(RECORD))
    path.write_bytes(text)
    with pytest.raises(FileAccessError, match=re.escape(str(path))):
        sets.load(LAYERS)


def test_what_was_saved_is_loaded_by_the_layers_paths(sets: WorkingSets) -> None:
    assert sets.load(LAYERS) is None
    path = sets.save(RECORD)
    assert path == sets.path(LAYERS) and os.listdir(sets.directory) == [os.path.basename(path)]
    assert sets.load(LAYERS) == RECORD
    assert sets.load(LAYERS[:1]) is None
    moved = (LAYERS[0], LAYERS[1]._replace(path="/elsewhere"))
    assert sets.load(moved) is None
    changed = (LAYERS[0]._replace(inode=9), LAYERS[1])
    assert sets.load(changed) == RECORD


def test_paths_that_are_joined_alike_have_records_of_their_own(sets: WorkingSets) -> None:
    one = [LAYERS[0]._replace(path=path) for path in ("/a", "/b/c")]
    other = [LAYERS[0]._replace(path=path) for path in ("/a/b", "/c")]
    assert sets.path(tuple(one)) != sets.path(tuple(other))


def test_a_new_record_takes_the_place_of_the_old_one_in_one_step(sets: WorkingSets) -> None:
    sets.save(RECORD)
    with open(sets.path(LAYERS), "rb") as old:
        newer = WorkingSet(LAYERS, RANGES[:1], RECORD.recorded)
        sets.save(newer)
        assert decode(old.read()) == RECORD
    assert sets.load(LAYERS) == newer
    assert len(os.listdir(sets.directory)) == 1


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_only_the_user_reads_records_and_the_directory(mask: int, sets: WorkingSets) -> None:
    before = os.umask(mask)
    try:
        path = sets.save(RECORD)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    for folder in (sets.directory, os.path.dirname(sets.directory)):
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700


def test_it_is_known_whether_there_are_any(sets: WorkingSets) -> None:
    assert not sets.has_any()
    sets.prepare()
    assert not sets.has_any()
    sets.save(RECORD)
    assert sets.has_any()


def test_its_key_tells_whether_a_record_was_replaced(sets: WorkingSets) -> None:
    assert sets.key(LAYERS) is None
    sets.save(RECORD)
    key = sets.key(LAYERS)
    assert key is not None and sets.key(LAYERS) == key and sets.key(LAYERS[:1]) is None
    sets.save(RECORD)
    assert sets.key(LAYERS) not in (None, key)
    assert sets.forget(LAYERS) and sets.key(LAYERS) is None


def test_nothing_is_made_before_there_is_something_to_save(sets: WorkingSets) -> None:
    assert sets.load(LAYERS) is None and not sets.forget(LAYERS)
    assert not os.path.exists(os.path.dirname(sets.directory))


@pytest.mark.parametrize("what", ["directory", "record"])
@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_what_others_may_write_to_is_not_believed(what: str, mode: int, sets: WorkingSets) -> None:
    path = sets.save(RECORD)
    os.chmod(sets.directory if what == "directory" else path, mode)
    with pytest.raises(FileAccessError, match="others may write to it"):
        sets.load(LAYERS)
    if what == "directory":
        with pytest.raises(FileAccessError, match="others may write to it"):
            sets.save(RECORD)


@pytest.mark.parametrize("what", ["directory", "record"])
def test_what_another_user_owns_is_not_believed(
    what: str, sets: WorkingSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sets.save(RECORD)
    if os.geteuid() == 0:
        os.chown(sets.directory if what == "directory" else path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(FileAccessError, match="belongs to user"):
        sets.load(LAYERS)


@pytest.mark.parametrize("kind", ["symlink", "fifo", "directory"])
def test_only_a_regular_file_is_read(kind: str, sets: WorkingSets, tmp_path: Path) -> None:
    path = Path(sets.save(RECORD))
    path.rename(tmp_path / "record")
    match kind:
        case "symlink":
            path.symlink_to(tmp_path / "record")
        case "fifo":
            os.mkfifo(path)
        case _:
            path.mkdir()
    with pytest.raises(FileAccessError, match=re.escape(str(path))):
        sets.load(LAYERS)


def test_a_file_that_is_too_large_is_not_read(sets: WorkingSets) -> None:
    path = sets.save(RECORD)
    os.truncate(path, (32 << 20) + 1)
    with pytest.raises(FileAccessError, match="more than 33554432 bytes"):
        sets.load(LAYERS)


def test_forgetting_removes_whatever_is_there(sets: WorkingSets) -> None:
    path = sets.save(RECORD)
    Path(path).write_bytes(b"damaged")
    assert sets.forget(LAYERS)
    assert not sets.forget(LAYERS) and not os.path.exists(path)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    sets = WorkingSets(str(tmp_path / "file" / "sets"))
    for attempt in (sets.prepare, lambda: sets.save(RECORD), lambda: sets.load(LAYERS)):
        with pytest.raises(FileAccessError, match=str(tmp_path)):
            attempt()


def test_by_default_it_is_below_the_state_directory(tmp_path: Path) -> None:
    assert WorkingSets().directory == f"{verified.default_directory()}/working-sets"
    assert WorkingSets(None, str(tmp_path)).directory == f"{tmp_path}/working-sets"
    assert WorkingSets("/named", str(tmp_path)).directory == "/named"


def test_a_user_without_a_home_must_name_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> str:
        raise KeyError

    monkeypatch.setattr(verified, "default_directory", no_home)
    with pytest.raises(FileAccessError, match="use --working-set-dir"):
        WorkingSets()
    assert WorkingSets("/named").directory == "/named"


# Which chain


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    base = write_layer(tmp_path / "base", 16 * PAGE, pages(0, range(16)))
    return [base, write_layer(tmp_path / "diff", 16 * PAGE, pages(1, [1]))]


def test_a_chain_is_the_same_open_or_not_and_by_any_path(files: list[Path], tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    found = identity_of_files([str(link / "base"), str(files[1])])
    with open_chain(link / "base", files[1:]).view as view:
        assert identity_of_view(view) == found
    status = files[0].stat()
    assert found[0] == (str(files[0]), status.st_ino, 16 * PAGE, status.st_mtime_ns)


def test_a_layer_that_was_renamed_is_known_by_its_new_path(files: list[Path]) -> None:
    with open_chain(files[0], files[1:]).view as view:
        files[1].rename(files[1].with_name("new"))
        assert identity_of_view(view) == identity_of_files(
            [str(files[0]), str(files[1].with_name("new"))]
        )


def test_a_layer_that_is_gone_is_no_traceback(tmp_path: Path) -> None:
    with pytest.raises(FileAccessError, match=f"{tmp_path}/gone: No such file"):
        identity_of_files([f"{tmp_path}/gone"])


def test_a_record_is_stale_once_a_layer_is_another(files: list[Path]) -> None:
    names = [str(path) for path in files]
    record = WorkingSet(identity_of_files(names), (), now())
    assert record.stale(identity_of_files(names)) is None
    files[0].chmod(0o600)
    assert record.stale(identity_of_files(names)) is None
    os.utime(files[1], ns=(5, 5))
    assert str(files[1]) in (record.stale(identity_of_files(names)) or "")
    assert record.stale(identity_of_files(names[:1])) == "it has 2 layers, the chain has 1"


@pytest.mark.parametrize("part", ["inode", "size", "mtime_ns", "path"])
def test_each_part_of_a_layer_counts(part: str) -> None:
    changed: dict[str, Any] = {part: "/x" if part == "path" else 1}
    other = LAYERS[0]._replace(**changed)
    assert RECORD.stale((other, LAYERS[1])) is not None
