"""--allow-outside: files that a snapshot records in a directory beside the store."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from diffmergefs.cli.mount import mount
from diffmergefs.core.beneath import AllowedRoots, open_directory, open_regular, stat_beneath
from diffmergefs.core.errors import BrokenChainError, FileAccessError, MountpointError
from diffmergefs.fuse.served import Store
from diffmergefs.opening.images import open_image
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.stores.catalog import StoreOptions, read_catalog
from diffmergefs.stores.lookup import find_image
from diffmergefs.system.mountpoint import check_mountpoint
from tests.support.commands import diffmergefs, mistake, succeed
from tests.support.images import overlay_oracle, write_layer
from tests.support.mounts import mounted
from tests.support.stores import (
    BASE_PAGES,
    OLD_NS,
    SECOND_NS,
    SIZE,
    age,
    pages,
    write_chain,
    write_document,
)

MERGED = overlay_oracle(SIZE, [pages(0, BASE_PAGES), pages(1, [1])])


@pytest.fixture
def root(public_path: Path) -> Path:
    """`store` with base and work, whose memory and vmstate lie in `pool`; `alias` links to it."""
    store, pool = public_path / "store", public_path / "pool"
    write_chain(store, ["base", "work"])
    (pool / "deep").mkdir(parents=True)
    for name in ("memory.bin", "vmstate"):
        (store / "work" / name).rename(pool / "deep" / f"work.{name}")
    (public_path / "alias").symlink_to("pool")
    record(public_path, public_path / "pool")
    return public_path


def record(root: Path, folder: str | Path, **fields: Any) -> None:
    """Have `work` record its files in this directory's `deep`."""
    where = {
        "memory": f"{folder}/deep/work.memory.bin",
        "vmstate": f"{folder}/deep/work.vmstate",
        "parent_tag": "base",
    }
    write_document(root / "store", "work", json.dumps(where | fields))


def allowing(*outside: str | Path) -> StoreOptions:
    return StoreOptions(allow_outside=tuple(map(str, outside)))


def problem(root: Path, *outside: str | Path) -> str:
    catalog = read_catalog(
        str(root / "store"),
        options=allowing(*outside),
    )
    with pytest.raises(BrokenChainError) as caught:
        catalog.chain("work")
    assert catalog.chain("base")
    text = str(caught.value)
    assert text.startswith("work/snapshot.json: ") or "regular file" in text, text
    return text


def content(root: Path, *outside: str | Path) -> bytes:
    policy = TrustPolicy(allow_outside=tuple(str(path) for path in outside))
    with open_image(root / "store" / "work", policy).view as view:
        return bytes(view.read(0, SIZE))


def test_a_file_outside_is_refused_with_the_way_to_allow_it(root: Path) -> None:
    text = problem(root)
    assert f"'{root}/pool/deep/work.memory.bin' is neither in 'work' nor" in text
    assert "--allow-outside DIR" in text
    assert "--allow-outside" not in problem_of_inside(root)


def problem_of_inside(root: Path) -> str:
    record(root, root / "store")
    return problem(root)


@pytest.mark.parametrize("allowed", ["pool", "pool/deep", "pool/", ".", "other/../pool"])
def test_a_file_beneath_an_allowed_directory_is_a_layer(root: Path, allowed: str) -> None:
    assert content(root, root / allowed) == MERGED
    policy = TrustPolicy(allow_outside=(str(root / allowed),))
    catalog, tag = find_image(root / "store" / "work", policy)
    link = catalog.snapshots[tag]
    assert link.layer.path == f"{root}/pool/deep/work.memory.bin"
    assert link.files == {"work.vmstate": f"{root}/pool/deep/work.vmstate"}


@pytest.mark.parametrize("allowed", ["other", "poo", "pool/deep/work.memory.bin/", "store", "po"])
def test_another_directory_allows_nothing(root: Path, allowed: str) -> None:
    assert problem(root, root / allowed)


def test_a_relative_directory_is_one_of_the_working_directory(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    assert content(root, "pool") == MERGED


def test_the_allowed_directory_may_be_a_symlink_and_nothing_in_it(root: Path) -> None:
    record(root, root / "alias")
    assert content(root, root / "alias") == MERGED
    assert "is neither in" in problem(root, root)  # here `alias` is inside the allowed one
    assert "is neither in" in problem(root, root / "pool")  # the name is what counts
    (root / "pool" / "link").symlink_to("deep")
    record(root, root, memory=f"{root}/pool/link/work.memory.bin")
    assert "is neither in" in problem(root, root / "pool")
    (root / "pool" / "file").symlink_to("deep/work.memory.bin")
    record(root, root, memory=f"{root}/pool/file")
    assert "is not a regular file" in problem(root, root / "pool")


@pytest.mark.parametrize(
    "recorded", ["{}/pool/../secret", "{}/pool/deep/../../secret", "{}/pool/./../secret"]
)
def test_no_path_climbs_out_of_the_allowed_directory(root: Path, recorded: str) -> None:
    write_layer(root / "secret", SIZE, [])
    record(root, root, memory=recorded.format(root))
    assert "does not name a file in the store" in problem(root, root / "pool")


def test_slashes_and_dots_in_a_recorded_path_mean_nothing(root: Path) -> None:
    record(root, f"/{root}//./pool/.")
    assert content(root, root / "pool") == MERGED


def test_a_fifo_outside_is_not_opened(root: Path) -> None:
    memory = root / "pool" / "deep" / "work.memory.bin"
    memory.unlink()
    os.mkfifo(memory)
    assert "is not a regular file" in problem(root, root / "pool")


def test_the_tags_own_directory_comes_first_and_two_files_are_refused(root: Path) -> None:
    own = write_layer(root / "store" / "work" / "work.memory.bin", SIZE, pages(2, [2]))
    age(own)
    forbidden = read_catalog(str(root / "store")).snapshots["work"]
    assert forbidden.layer.path == "work/work.memory.bin"
    assert "work.vmstate' is neither in 'work' nor" in str(forbidden.problem)
    assert "two different files" in problem(root, root / "pool")
    (root / "pool" / "deep" / "work.memory.bin").unlink()
    os.link(own, root / "pool" / "deep" / "work.memory.bin")
    found = read_catalog(str(root / "store"), options=allowing(root / "pool")).snapshots["work"]
    assert found.layer.path == "work/work.memory.bin"


def test_a_path_beneath_source_is_looked_for_in_source_only(root: Path) -> None:
    (root / "store" / "link").symlink_to("../pool")
    record(root, root / "store" / "link")
    assert "is neither in" in problem(root, root / "store" / "link")


def test_a_file_outside_belongs_to_what_must_stand_still(root: Path) -> None:
    before = read_catalog(str(root / "store"), options=allowing(root)).snapshots["work"]
    os.utime(root / "pool" / "deep" / "work.memory.bin")
    after = read_catalog(str(root / "store"), options=allowing(root)).snapshots["work"]
    assert before.state != after.state and before.newest_ns < after.newest_ns


@pytest.fixture
def inside(root: Path) -> Any:
    fd = os.open(root / "store", os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def test_the_deepest_allowed_directory_counts(root: Path, inside: int) -> None:
    record(root, root)
    roots = AllowedRoots(inside, [str(root), str(root / "alias")])
    os.close(open_regular(roots, f"{root}/alias/deep/work.vmstate"))
    os.close(open_directory(roots, f"{root}/alias"))
    assert stat.S_ISLNK(stat_beneath(AllowedRoots(inside, [str(root)]), f"{root}/alias").st_mode)


@pytest.mark.parametrize("path", ["/etc/passwd", "{}/pool-2/x", "{}/pool/../x", "../pool", "{}"])
def test_reach_lets_nothing_else_through(root: Path, inside: int, path: str) -> None:
    roots = AllowedRoots(inside, [str(root / "pool")])
    with pytest.raises(FileAccessError, match="not a path beneath its directory"):
        open_regular(roots, path.format(root))


def test_the_whole_machine_can_be_allowed(root: Path, inside: int) -> None:
    roots = AllowedRoots(inside, ["/"])
    os.close(open_regular(roots, f"{root}/pool/deep/work.vmstate"))
    os.close(open_directory(roots, "/"))
    assert stat_beneath(roots, "").st_ino == (root / "store").stat().st_ino
    assert stat_beneath(roots, "base").st_ino == (root / "store" / "base").stat().st_ino


def test_who_may_read_follows_from_the_directories_outside_too(root: Path) -> None:
    def mode() -> int:
        policy = TrustPolicy(allow_outside=(str(root / "alias"),))
        store = Store(str(root / "store"), policy, clock=lambda: OLD_NS + 100 * SECOND_NS)
        store.look()
        return store.open("work").access.mode

    record(root, root / "alias")
    assert mode() == 0o444
    (root / "pool" / "deep").chmod(0o700)
    assert mode() == 0o400
    (root / "pool" / "deep").chmod(0o755)
    (root / "pool").chmod(0o750)
    assert mode() == 0o440


def test_list_info_and_flatten_take_it(root: Path) -> None:
    allow = ("--allow-outside", root / "other", "--allow-outside", root / "pool")
    rows = json.loads(succeed("list", "--json", *allow, root / "store"))
    assert [(row["tag"], row["state"]) for row in rows] == [
        ("base", "complete"),
        ("work", "complete"),
    ]
    facts = json.loads(succeed("info", "--json", *allow, root / "store" / "work"))
    assert facts["layers"][1]["path"] == f"{root}/pool/deep/work.memory.bin"
    succeed("flatten", *allow, root / "store" / "work", "-o", root / "whole")
    assert (root / "whole").read_bytes() == MERGED
    assert "--allow-outside DIR" in mistake(3, "info", root / "store" / "work")


def test_a_mount_shows_what_lies_outside_and_no_layer_by_another_name(
    root: Path, mountpoint: Path
) -> None:
    os.link(root / "pool" / "deep" / "work.memory.bin", root / "store" / "work" / "other-name")
    os.chmod(root / "pool" / "deep", 0o700)
    options = ("-o", f"allow_outside={root}/pool")
    with mounted(root / "store", mountpoint, *options):
        folder = mountpoint / "work"
        assert set(os.listdir(folder)) == {"work.memory.bin", "work.vmstate", "snapshot.json"}
        assert (folder / "work.memory.bin").read_bytes() == MERGED
        assert (folder / "work.vmstate").read_bytes() == b"state of work"
        assert stat.S_IMODE((folder / "work.memory.bin").stat().st_mode) == 0o400
        assert stat.S_IMODE((folder / "work.vmstate").stat().st_mode) & 0o077 == 0
        document = json.loads((folder / "snapshot.json").read_bytes())
        assert document["memory"] == str(folder / "work.memory.bin")
        assert document["vmstate"] == str(folder / "work.vmstate")


def test_a_mount_without_it_shows_the_rest(root: Path, mountpoint: Path) -> None:
    with mounted(root / "store", mountpoint, expect_log=("--allow-outside DIR",)) as mount:
        assert os.listdir(mountpoint) == ["base"]
        assert f"work: not shown: work/snapshot.json: the recorded file '{root}/pool" in mount.log()


def test_directories_add_up_however_they_are_given() -> None:
    words = ["a", "b", "--allow-outside", "/x/", "-o", "ro,allow_outside=/y,allow_outside=/x/../z"]
    context = mount.make_context("mount", words)
    assert context.params["allow_outside"] == ("/x", "/y", "/z")


@pytest.mark.parametrize("allowed", ["pool", "", "pool/mnt"])
def test_a_mountpoint_in_or_above_an_allowed_directory_is_refused(root: Path, allowed: str) -> None:
    (root / "pool" / "mnt").mkdir()
    where = {"pool/mnt": "pool"}.get(allowed, "pool/mnt")
    with pytest.raises(MountpointError, match=r"inside the allowed directory|lies above"):
        check_mountpoint(str(root / where), str(root / "store"), [], [str(root / allowed)])


def test_it_goes_with_a_directory_of_snapshots_only(root: Path) -> None:
    base = root / "store" / "base" / "memory.bin"
    for command in (("info", "--base", base), ("mount", "--base", base, root / "mnt")):
        done = diffmergefs(*command, "--allow-outside", root)
        assert done.returncode == 2
        assert "not with --base and --diff" in done.stderr
    done = diffmergefs("apply", "--allow-outside", root, base, base)
    assert (done.returncode, "no such option" in done.stderr) == (2, True)
    done = diffmergefs("list", "--allow-outside", "", root)
    assert (done.returncode, "an empty path" in done.stderr) == (2, True)
