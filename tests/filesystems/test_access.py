"""Law 9: owner and bits of a view, with real files, directories and ACLs."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from diffmergefs.core.errors import DiffMergeError
from diffmergefs.core.identity import has_acl
from diffmergefs.core.layer import Layer
from diffmergefs.fuse.access import (
    Access,
    folder_bits,
    lineage,
    view_access,
)
from diffmergefs.fuse.nodes import OpenImage
from diffmergefs.fuse.served import Store
from diffmergefs.opening.images import open_chain
from diffmergefs.opening.trust import TrustPolicy
from tests.support import skips
from tests.support.images import PAGE, overlay_oracle, write_layer
from tests.support.openat2 import exchange
from tests.support.stores import BASE_PAGES, OLD_NS, SECOND_NS, SIZE, pages, write_tag
from tests.support.swaps import Swapped
from tests.support.users import NOBODY, STRANGER, run_as

pytestmark = pytest.mark.usefixtures("as_root")

Owner = tuple[int, int]
ROOT: Owner = (0, 0)


@pytest.fixture
def as_root() -> None:
    skips.require_root()


def own(path: Path, owner: Owner, mode: int) -> Path:
    os.chown(path, *owner)
    path.chmod(mode)
    return path


def folder(path: Path, owner: Owner = ROOT, mode: int = 0o755) -> Path:
    path.mkdir()
    return own(path, owner, mode)


def layer(path: Path, mode: int, owner: Owner = ROOT) -> Layer:
    return Layer.open(str(own(write_layer(path, PAGE, []), owner, mode)))


@contextmanager
def directory(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def bits_of(path: Path) -> int:
    with directory(path) as fd:
        return folder_bits(fd)


def acl(path: Path, entry: str) -> None:
    subprocess.run(["setfacl", "-m", entry, str(path)], check=True)


@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        ([0o644], 0o444),
        ([0o777, 0o755], 0o444),
        ([0o644, 0o640], 0o440),
        ([0o640, 0o604], 0o400),
        ([0o600, 0o644, 0o644], 0o400),
        ([0o644, 0o644, 0o600], 0o400),
        ([0o444, 0o044], 0o044),
        ([0o200], 0),
    ],
)
@pytest.mark.parametrize("owner", [ROOT, (NOBODY, STRANGER)])
def test_layers_of_one_owner_give_the_and_of_their_read_bits(
    modes: list[int], expected: int, owner: Owner, public_path: Path
) -> None:
    layers = [layer(public_path / f"{n}", mode, owner) for n, mode in enumerate(modes)]
    assert view_access(layers) == Access(*owner, expected)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([(ROOT, 0o644), ((NOBODY, 0), 0o644)], 0o444),
        ([(ROOT, 0o644), ((0, STRANGER), 0o664)], 0o444),
        ([(ROOT, 0o644), ((NOBODY, 0), 0o640)], 0o400),
        ([(ROOT, 0o604), ((NOBODY, 0), 0o644)], 0o400),
        ([(ROOT, 0o600), ((NOBODY, NOBODY), 0o600)], 0o400),
        ([((STRANGER, STRANGER), 0o444), ((NOBODY, NOBODY), 0o444)], 0o444),
    ],
)
def test_layers_of_several_owners_belong_to_the_mounting_user(
    files: list[tuple[Owner, int]], expected: int, public_path: Path
) -> None:
    layers = [layer(public_path / f"{n}", mode, owner) for n, (owner, mode) in enumerate(files)]
    assert view_access(layers) == Access(os.geteuid(), os.getegid(), expected)


STRANGE: Owner = (STRANGER, STRANGER)


@pytest.mark.parametrize(
    ("directory", "mode", "owner", "expected"),
    [
        (ROOT, 0o755, ROOT, 0o444),
        (ROOT, 0o711, ROOT, 0o444),
        (ROOT, 0o744, ROOT, 0o400),  # to read a directory is not to search it
        (ROOT, 0o750, ROOT, 0o440),
        (ROOT, 0o700, ROOT, 0o400),
        (ROOT, 0o705, ROOT, 0o400),  # in the directory's group, others are locked out
        (ROOT, 0o755, STRANGE, 0o444),
        (ROOT, 0o700, STRANGE, 0),  # nor may the owner of the file come in
        ((0, STRANGER), 0o750, STRANGE, 0o040),
        (ROOT, 0o750, STRANGE, 0),
        (ROOT, 0o701, STRANGE, 0),  # the file's group may be in the directory's
        (STRANGE, 0o700, STRANGE, 0o400),
        (STRANGE, 0o700, ROOT, 0o400),  # the mounting user has come in
    ],
)
def test_a_class_keeps_its_bit_where_the_directory_lets_it_search(
    directory: Owner, mode: int, owner: Owner, expected: int, public_path: Path
) -> None:
    path = folder(public_path / "dir", directory, mode)
    assert view_access([layer(path / "file", 0o644, owner)]) == Access(*owner, expected)


def test_every_directory_of_every_layer_counts(public_path: Path) -> None:
    top = folder(public_path / "top")
    closed = folder(top / "closed", mode=0o750)
    below = folder(closed / "below")
    layers = [layer(top / "base", 0o644), layer(below / "diff", 0o644)]
    assert view_access(layers[:1]).mode == 0o444
    assert view_access(layers).mode == 0o440
    own(top, ROOT, 0o700)
    assert view_access(layers[:1]).mode == 0o400


def test_the_directories_are_those_of_the_real_path(public_path: Path) -> None:
    closed = folder(public_path / "closed", mode=0o700)
    write_layer(closed / "file", PAGE, []).chmod(0o644)
    (public_path / "link").symlink_to(closed)
    assert view_access([Layer.open(str(public_path / "link" / "file"))]).mode == 0o400


def test_paths_are_relative_to_the_root_and_may_be_those_of_today(public_path: Path) -> None:
    closed = folder(public_path / "closed", mode=0o700)
    write_layer(closed / "file", PAGE, []).chmod(0o644)
    with directory(public_path) as fd:
        inner = Layer.open("closed/file", fd)
        assert view_access([inner], fd, ["closed/file"]).mode == 0o400
        (closed / "file").rename(public_path / "file")
        assert view_access([inner], fd, ["file"]).mode == 0o444
        assert view_access([inner]).mode == 0o444


def test_a_file_with_an_acl_counts_as_0400(public_path: Path) -> None:
    plain, listed = layer(public_path / "plain", 0o644), layer(public_path / "listed", 0o644)
    assert not has_acl(listed.fd)
    acl(public_path / "listed", f"u:{STRANGER}:r")
    assert has_acl(listed.fd) and has_acl(str(public_path / "listed"))
    assert view_access([plain]).mode == 0o444
    assert view_access([plain, listed]).mode == 0o400
    # Removed again: an ACL that says no more than the mode is none.
    subprocess.run(["setfacl", "-b", str(public_path / "listed")], check=True)
    assert view_access([plain, listed]).mode == 0o444


def test_a_mask_that_looks_like_group_bits_opens_nothing(public_path: Path) -> None:
    found = layer(public_path / "file", 0o600)
    acl(public_path / "file", f"u:{STRANGER}:r")
    assert os.fstat(found.fd).st_mode & 0o777 == 0o640
    assert view_access([found]).mode == 0o400
    path = folder(public_path / "dir", mode=0o700)
    acl(path, f"u:{STRANGER}:rx")
    assert path.stat().st_mode & 0o777 == 0o750
    assert view_access([layer(path / "file", 0o644)]).mode == 0o400


def test_a_directory_with_an_acl_lets_its_owner_alone_in(public_path: Path) -> None:
    path = folder(public_path / "dir")
    acl(path, f"u:{STRANGER}:-")
    assert view_access([layer(path / "file", 0o644)]).mode == 0o400


def test_the_mirror_of_a_directory_has_its_bits_for_whom_it_can_be_reached(
    public_path: Path,
) -> None:
    top = folder(public_path / "top")
    inner = folder(top / "inner", mode=0o755)
    assert bits_of(inner) == 0o755
    own(inner, ROOT, 0o711)
    assert bits_of(inner) == 0o711
    own(top, ROOT, 0o750)
    assert bits_of(inner) == 0o710
    own(top, ROOT, 0o755)
    acl(inner, f"u:{STRANGER}:rx")
    assert bits_of(inner) == 0o700


def test_a_directory_that_is_mounted_on_one_of_its_own_is_not_the_root(public_path: Path) -> None:
    skips.require_mounts()
    closed = folder(public_path / "closed", mode=0o700)
    again = folder(folder(closed / "dir") / "again")
    found = layer(closed / "dir" / "file", 0o644)
    subprocess.run(["mount", "--bind", closed / "dir", again], check=True, timeout=60)
    try:
        with directory(closed) as fd:
            above = lineage(fd)
        with directory(again) as fd:
            assert lineage(fd) == [Access(0, 0, 0o755)] * 2 + above
            assert view_access([found], fd, ["file"]).mode == 0o400
    finally:
        subprocess.run(["umount", again], check=True, timeout=60)


def test_a_file_that_has_no_name_is_for_its_owner_alone(public_path: Path) -> None:
    found = layer(public_path / "file", 0o644)
    (public_path / "file").unlink()
    # What has come to stand there, by either of its names, is another file.
    own(write_layer(public_path / "file", PAGE, []), ROOT, 0o644)
    own(write_layer(public_path / "file (deleted)", PAGE, []), ROOT, 0o644)
    assert view_access([found]).mode == 0o400
    memory = os.memfd_create("guest")
    os.fchmod(memory, 0o644)
    os.truncate(memory, PAGE)
    assert view_access([Layer("a memfd", memory)]).mode == 0o400


def test_a_path_that_leads_to_another_file_by_now_tells_nothing(public_path: Path) -> None:
    closed = folder(public_path / "closed", mode=0o700)
    bait = folder(public_path / "bait")
    for place in (closed, bait):
        write_layer(place / "file", PAGE, []).chmod(0o644)
    with directory(public_path) as fd:
        found = Layer.open("closed/file", fd)
        exchange(closed, bait)
        with pytest.raises(OSError) as caught:
            view_access([found], fd, ["closed/file"])
        assert caught.value.errno == errno.ESTALE
        exchange(closed, bait)
        assert view_access([found], fd, ["closed/file"]).mode == 0o400


def test_no_moment_of_an_exchange_opens_a_door(
    public_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever the private directory and the bait change places, and change back."""
    root = folder(public_path / "store")
    secret = write_tag(root, "secret", layer=1)
    own(secret, ROOT, 0o700)
    bait = write_tag(public_path, "bait", layer=2)
    for place in (secret, bait):
        os.utime(own(place / "memory.bin", ROOT, 0o644), ns=(OLD_NS, OLD_NS))
    ours = {overlay(n): mode for n, mode in ((1, 0o400), (2, 0o444))}
    swapped = Swapped(monkeypatch, secret, bait)
    seen = set()

    def shown(at: tuple[int, ...]) -> None:
        store = Store(str(root), TrustPolicy(), clock=lambda: OLD_NS + 100 * SECOND_NS)
        store.look()
        with swapped.during(at):
            with suppress(DiffMergeError):
                seen.add(check(store.open("secret")))
            store.look()
            if image := store.opened("secret"):
                seen.add(check(image))

    def check(image: OpenImage) -> int:
        content = bytes(image.view.read(0, SIZE))
        assert image.access.mode | ours[content] == ours[content]
        return image.access.mode

    for at in swapped.moments(lambda: shown(())):
        shown(at)
    assert 0o400 in seen


def overlay(number: int) -> bytes:
    return overlay_oracle(SIZE, [pages(number, BASE_PAGES)])


def test_an_acl_that_cannot_be_read_is_an_error_and_not_no_acl(
    public_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = layer(public_path / "file", 0o644)

    def refuse(*_: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "getxattr", refuse)
    with pytest.raises(PermissionError):
        view_access([found])


USERS = [*itertools.product((NOBODY, STRANGER), (0, NOBODY, STRANGER))]
OWNERS: list[Owner] = [ROOT, (NOBODY, NOBODY), (NOBODY, STRANGER), (0, STRANGER)]


def readable(paths: Sequence[Path], user: Owner) -> set[str]:
    """Which of the files this user may read: the kernel says so."""
    script = 'for f; do [ -r "$f" ] && printf "%s\\n" "$f"; done; true'
    result = run_as(*user, ["/bin/sh", "-c", script, "sh", *map(str, paths)], text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines())


def grants(access: Access, user: Owner) -> bool:
    uid, gid = user
    shift = 6 if uid == access.uid else 3 if gid == access.gid else 0
    return bool(access.mode >> shift & 4)


def test_nobody_reads_a_view_who_cannot_read_all_its_layers(public_path: Path) -> None:
    files: list[Path] = []
    numbers = itertools.count()
    for owner, mode in itertools.product(OWNERS, (0o755, 0o751, 0o750, 0o701, 0o700)):
        path = folder(public_path / f"{next(numbers)}", owner, mode)
        for file_owner, file_mode in itertools.product(OWNERS, (0o644, 0o640, 0o600)):
            file = write_layer(path / f"{next(numbers)}", PAGE, [])
            files.append(own(file, file_owner, file_mode))
    layers = [Layer.open(str(file)) for file in files]
    # Each file with itself, and with some other one.
    pairs = [(n, m) for n in range(len(files)) for m in (n, n * 7 % len(files))]
    views = [(n, m, view_access([layers[n], layers[m]])) for n, m in pairs]
    granted = 0
    for user in USERS:
        may = readable(files, user)
        for n, m, access in views:
            if grants(access, user):
                granted += 1
                assert str(files[n]) in may, (user, files[n], access)
                assert str(files[m]) in may, (user, files[m], access)
    assert granted > 200  # else this has proven nothing


def test_no_moment_of_an_exchange_opens_a_door_to_explicit_layers(
    public_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret, bait = write_tag(public_path, "secret", layer=1), write_tag(public_path, "bait")
    own(secret, ROOT, 0o700)
    for place in (secret, bait):
        own(place / "memory.bin", ROOT, 0o644)
    (public_path / "link").symlink_to("secret/memory.bin")
    swapped = Swapped(monkeypatch, secret, bait)
    seen = set()

    def shown(at: tuple[int, ...]) -> None:
        with swapped.during(at), suppress(DiffMergeError, OSError):
            image = open_chain(public_path / "link")
            with image.view as view:
                mode = view_access(view.layers).mode
                is_secret = bytes(view.read(0, SIZE)) == overlay(1)
            seen.add((is_secret, mode))

    for at in swapped.moments(lambda: shown(())):
        shown(at)
    assert seen == {(True, 0o400), (False, 0o444)}
