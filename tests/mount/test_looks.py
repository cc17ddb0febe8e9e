"""Looks at a served directory: a bad entry, a failing or slow look, a VMM that overwrites."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs.core.errors import BrokenChainError
from diffmergefs.fuse.served import Store
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.stores import catalog
from diffmergefs.stores.catalog import StoreOptions, read_catalog
from diffmergefs.stores.snapshot import status_of
from tests.support.commands import succeed
from tests.support.images import overlay_oracle, write_layer
from tests.support.live import until, until_equal
from tests.support.mounts import mounted
from tests.support.refusing import KINDS, refusing
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
from tests.support.superserve import write_sandbox, write_template

LEAF = overlay_oracle(SIZE, [pages(0, BASE_PAGES), pages(1, [1])])


@pytest.fixture
def store(public_path: Path) -> Path:
    return write_chain(public_path / "store", ["base", "leaf"])


def read(path: Path) -> bytes | str:
    """The bytes of the file, or the name of the errno."""
    try:
        return path.read_bytes()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


# One bad entry


@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_that_refuses_lstat_breaks_its_own_tag_and_no_other(
    store: Path, mountpoint: Path, kind: str
) -> None:
    (store / "other").mkdir()
    (store / "leaf" / "sub").mkdir()
    with (
        refusing(store / "other", kind),
        refusing(store / "leaf" / "sub", kind),
        mounted(store, mountpoint, expect_log=("other: not shown: other: ",)) as mount,
    ):
        assert sorted(os.listdir(mountpoint)) == ["base", "leaf"]
        names = ["memory.bin", "snapshot.json", "vmstate"]
        assert sorted(os.listdir(mountpoint / "leaf")) == names
        assert read(mountpoint / "leaf" / "memory.bin") == LEAF
        rows = {row["tag"]: row for row in json.loads(succeed("list", "--json", store))}
        assert rows["leaf"]["state"] == "complete"
        reason = os.strerror(getattr(errno, kind))
        assert (rows["other"]["state"], rows["other"]["reason"]) == ("broken", f"other: {reason}")
        write_tag(store, "new", "base", layer=1)
        until(lambda: "new" in os.listdir(mountpoint), "later looks fail")
        assert mount.log().count("other: not shown") == 1


def test_an_entry_whose_lstat_starts_to_fail_leaves_the_others_served(
    store: Path, mountpoint: Path
) -> None:
    write_tag(store, "other")
    with mounted(store, mountpoint, expect_log=("other: not shown: other: ",)):
        assert sorted(os.listdir(mountpoint)) == ["base", "leaf", "other"]
        with refusing(store / "other", "ENOTCONN"):
            until(lambda: sorted(os.listdir(mountpoint)) == ["base", "leaf"], "others went too")
        until(lambda: "other" in os.listdir(mountpoint), "it does not come back")


@pytest.fixture(params=[errno.EACCES, errno.ENOTCONN, errno.ESTALE, errno.EIO])
def refused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names in a source whose lstat fails, once for each error."""
    names: set[str] = set()
    real = status_of

    def refuse(entry: os.DirEntry[str]) -> os.stat_result | None:
        if entry.name in names:
            raise OSError(request.param, os.strerror(request.param), entry.name)
        return real(entry)

    monkeypatch.setattr(catalog, "status_of", refuse)
    return names


def reason(directory: Path, tag: str) -> str:
    with pytest.raises(BrokenChainError) as caught:
        read_catalog(str(directory)).chain(tag)
    return str(caught.value)


@pytest.mark.parametrize("name", ["001-a.mem", "001-a.vmstate"])
def test_a_numbered_file_that_refuses_lstat_breaks_its_step(
    tmp_path: Path, refused: set[str], name: str
) -> None:
    names = ["000-base.mem", "001-a.mem", "002-b.mem"]
    write_numbered(tmp_path, names, companions=["001-a.vmstate", "notes"])
    refused |= {name, "notes"}
    assert len(read_catalog(str(tmp_path)).chain("base")) == 1
    assert reason(tmp_path, "a").startswith(f"{name}: ")
    assert reason(tmp_path, "b").startswith(f"ancestor 'a' is broken: {name}: ")


def test_a_file_that_refuses_lstat_is_no_tag(store: Path, refused: set[str]) -> None:
    (store / "notes").touch()
    refused.add("notes")
    found = read_catalog(str(store))
    assert set(found.snapshots) == {"base", "leaf"}


def test_a_directory_that_refuses_lstat_is_looked_into(store: Path, refused: set[str]) -> None:
    refused.add("leaf")
    assert len(read_catalog(str(store)).chain("leaf")) == 2


def test_a_base_outside_that_refuses_lstat_breaks_its_own_sandbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "store"
    write_sandbox(root, "vm-1", write_template(root))
    (tmp_path / "outside").mkdir()
    write_sandbox(root, "vm-2", write_layer(tmp_path / "outside" / "lone", SIZE, pages(3, [3])))
    options = StoreOptions(allow_outside=(str(tmp_path / "outside"),))
    assert len(read_catalog(str(root), options=options).chain("vm-2")) == 2
    with refusing(tmp_path / "outside", "EACCES"):
        found = read_catalog(str(root), options=options)
    assert len(found.chain("vm-1")) == 2
    with pytest.raises(BrokenChainError, match="Permission denied"):
        found.chain("vm-2")
    assert "vm-2/mem.diff" in found.hidden


# A VMM that overwrites its snapshot


def write_pair(folder: Path, memory: str, vmstate: str, n: int, order: tuple[int, int]) -> None:
    """Replace both files of a tag by renames, one after the other."""
    for which in order:
        new = folder / "new.tmp"
        if which == 0:
            write_layer(new, SIZE, pages(n, range(16)))
        else:
            new.write_bytes(b"%03x" % n)
        age(new)
        new.rename(folder / (memory, vmstate)[which])


def overwrite(folder: Path, memory: str, vmstate: str, n: int, order: tuple[int, int]) -> None:
    """Overwrite both files of a tag in place."""
    for which in order:
        if which == 0:
            with (folder / memory).open("r+b") as file:
                file.write(b"".join(data for _, data in pages(n, range(16))))
        else:
            (folder / vmstate).write_bytes(b"%03x" % n)


@pytest.mark.parametrize("write", [write_pair, overwrite])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("layout", ["forkd", "numbered"])
def test_no_memory_is_served_with_the_device_state_of_another(
    layout: str,
    order: tuple[int, int],
    write: Callable[[Path, str, str, int, tuple[int, int]], None],
    public_path: Path,
    mountpoint: Path,
) -> None:
    folder, shown = public_path / "store", mountpoint / "tag"
    memory, vmstate = "memory.bin", "vmstate"
    if layout == "forkd":
        write_tag(folder, "tag")
        folder = folder / "tag"
    else:
        memory, vmstate = "000-tag.mem", "000-tag.vmstate"
        write_numbered(folder, [memory], companions=[vmstate])
    write_pair(folder, memory, vmstate, 1, order)
    pairs: set[tuple[bytes, bytes]] = set()

    def look() -> None:
        # What was served all the time, however long this process had to wait meanwhile.
        before, state, after = (read(shown / name) for name in (memory, vmstate, memory))
        if isinstance(state, bytes) and isinstance(before, bytes) and before == after:
            pairs.add((before[:3], state))

    with mounted(public_path / "store", mountpoint, expect_log=("changed", "overwritten")):
        for n in range(1, 5):
            if n > 1:
                write(folder, memory, vmstate, n, order)
            same = b"%03x" % n

            def came(same: bytes = same) -> bool:
                look()
                return (same, same) in pairs

            until(came, f"{same!r} is not shown")
    assert pairs == {(b"%03x" % n, b"%03x" % n) for n in range(1, 5)}


@pytest.fixture
def looked(store: Path) -> Store:
    served = Store(str(store), TrustPolicy())
    served.look()
    return served


def test_device_state_that_is_open_is_not_read_once_it_was_overwritten(
    store: Path, mountpoint: Path
) -> None:
    with (
        mounted(store, mountpoint, expect_log=("overwritten while it was open",)),
        (mountpoint / "leaf" / "vmstate").open("rb", buffering=0) as held,
        (mountpoint / "base" / "vmstate").open("rb", buffering=0) as replaced,
    ):
        (store / "leaf" / "vmstate").write_bytes(b"another")
        with pytest.raises(OSError, match="Input/output error"):
            held.read()
        (store / "base" / "vmstate").unlink()  # this does not matter, because it is open
        assert replaced.read() == b"state of base"


def test_other_files_of_a_tag_pass_as_they_are(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint):
        for n in range(3):
            (store / "leaf" / "log").write_bytes(b"%d" % n)
            # The kernel may keep the attributes for half a second, but no bytes.
            until_equal(lambda: read(mountpoint / "leaf" / "log"), b"%d" % n)
            assert read(mountpoint / "leaf" / "vmstate") == b"state of leaf"
            assert read(mountpoint / "leaf" / "memory.bin") == LEAF


def test_a_tag_whose_log_grows_all_the_time_is_served(store: Path) -> None:
    write_tag(store, "new", "base", layer=1)
    os.utime(store / "new" / "memory.bin")
    served = Store(str(store), TrustPolicy())
    for n in range(2):
        (store / "new" / "log").write_bytes(bytes(n + 1))
        served.look()
    assert "new" in served.tags()


def test_a_chmod_of_device_state_passes_at_the_next_look(store: Path, looked: Store) -> None:
    path = store / "leaf" / "vmstate"
    looked.seen.require_seen("leaf/vmstate", path.stat())
    path.chmod(0o600)
    with pytest.raises(OSError, match="it changed since it was looked at") as caught:
        looked.seen.require_seen("leaf/vmstate", path.stat())
    assert caught.value.errno == errno.EBUSY
    looked.look()
    looked.seen.require_seen("leaf/vmstate", path.stat())


def test_device_state_shared_by_two_tags_belongs_to_the_served_one(
    store: Path,
) -> None:
    (store / "shared").mkdir()
    shared = store / "shared" / "vm.state"
    shutil.copy(store / "leaf" / "vmstate", shared)
    age(shared)
    for tag, parent in (("leaf", "base"), ("orphan", "nobody")):
        (store / tag).mkdir(exist_ok=True)
        write_layer(store / tag / "memory.bin", SIZE, pages(1, [1]))
        age(store / tag / "memory.bin")
        document = {"memory": "memory.bin", "parent_tag": parent, "vmstate": str(shared)}
        (store / tag / "vmstate").unlink(missing_ok=True)
        write_document(store, tag, json.dumps(document))
    served = Store(str(store), TrustPolicy())
    served.look()
    assert set(served.tags()) == {"base", "leaf"}
    served.seen.require_seen("shared/vm.state", shared.stat())
