"""Nothing can be changed through a mount, with or without --open-rw."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.inputs import unchanged
from tests.support.mounts import mounted

SIZE = 64 * PAGE + 100
LAYERS = [[(0, signed(0, 0, SIZE))], [(8 * PAGE, signed(1, 8 * PAGE, 4 * PAGE))]]
MEMORY = overlay_oracle(SIZE, LAYERS)


def write_store(store: Path) -> list[Path]:
    """A base and a diff with other files beside it; all files."""
    for n, tag in enumerate(("base", "child")):
        folder = store / tag
        folder.mkdir(parents=True)
        document = {"memory": "memory.bin"} | ({"parent_tag": "base"} if n else {})
        (folder / "snapshot.json").write_text(json.dumps(document))
        write_layer(folder / "memory.bin", SIZE, LAYERS[n])
    (store / "child" / "vmstate").write_bytes(b"state")
    (store / "child" / "sub").mkdir()
    (store / "child" / "sub" / "file").write_bytes(b"below")
    (store / "child" / "link").symlink_to("vmstate")
    return [path for path in store.rglob("*") if path.is_file() and not path.is_symlink()]


FILE_CHANGES: dict[str, Callable[[str], object]] = {
    "truncate": lambda path: os.truncate(path, 0),
    "extend": lambda path: os.truncate(path, 10 * SIZE),
    "open to truncate": lambda path: os.open(path, os.O_WRONLY | os.O_TRUNC),
    "open rw to truncate": lambda path: os.open(path, os.O_RDWR | os.O_TRUNC),
    "open ro to truncate": lambda path: os.open(path, os.O_RDONLY | os.O_TRUNC),
    "chmod": lambda path: os.chmod(path, 0o777),
    "chown": lambda path: os.chown(path, 1, 1),
    "utimes": lambda path: os.utime(path, (1, 1)),
    "setxattr": lambda path: os.setxattr(path, "user.x", b"1"),
    "trusted xattr": lambda path: os.setxattr(path, "trusted.x", b"1"),
    "removexattr": lambda path: os.removexattr(path, "user.x"),
    "unlink": os.unlink,
    "rename": lambda path: os.rename(path, path + "2"),
    "link": lambda path: os.link(path, path + "2"),
}
FOLDER_CHANGES: dict[str, Callable[[str], object]] = {
    "create": lambda path: os.open(f"{path}/new", os.O_WRONLY | os.O_CREAT),
    "create anew": lambda path: os.open(f"{path}/new", os.O_RDWR | os.O_CREAT | os.O_EXCL),
    "mkdir": lambda path: os.mkdir(f"{path}/new"),
    "symlink": lambda path: os.symlink("x", f"{path}/new"),
    "mknod": lambda path: os.mknod(f"{path}/new", 0o100644),
    "mkfifo": lambda path: os.mkfifo(f"{path}/new"),
    "chmod": lambda path: os.chmod(path, 0o777),
    "chown": lambda path: os.chown(path, 1, 1),
    "utimes": lambda path: os.utime(path),
}
WRITING_OPENS: dict[str, Callable[[str], object]] = {
    "open for writing": lambda path: os.open(path, os.O_WRONLY),
    "open to append": lambda path: os.open(path, os.O_WRONLY | os.O_APPEND),
    "open read-write": lambda path: os.open(path, os.O_RDWR),
    "open, created if missing": lambda path: os.open(path, os.O_RDWR | os.O_CREAT),
}


def answer(change: Callable[[str], object], path: str) -> str:
    try:
        change(path)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"


def answers(changes: Mapping[str, Callable[[str], object]], path: Path) -> dict[str, str]:
    """Those changes whose answer was not EROFS."""
    found = {name: answer(change, str(path)) for name, change in changes.items()}
    return {name: text for name, text in found.items() if text != "EROFS"}


def shell(script: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    command = ["sh", "-c", script, "sh", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("options", [(), ("--open-rw",)], ids=["ordinary", "open-rw"])
def test_every_change_is_refused(
    public_path: Path, mountpoint: Path, options: tuple[str, ...]
) -> None:
    store = public_path / "store"
    paths = write_store(store)
    with unchanged(paths), mounted(store, mountpoint, *options):
        tag = mountpoint / "child"
        memory = tag / "memory.bin"
        passed = [tag / "vmstate", tag / "sub" / "file", tag / "snapshot.json"]
        before = {path: (path.stat(), path.read_bytes()) for path in [memory, *passed]}
        for path in [memory, *passed]:
            assert answers(FILE_CHANGES, path) == {}, path
        for path in passed if options else [memory, *passed]:
            assert answers(WRITING_OPENS, path) == {}, path
        for path in (mountpoint, tag, tag / "sub"):
            assert answers(FOLDER_CHANGES, path) == {}, path
        for path in (tag, tag / "sub"):
            moving = {
                "rmdir": os.rmdir,
                "rename": lambda old: os.rename(old, f"{mountpoint}/new"),
            }
            assert answers(moving, path) == {}, path
        links = {
            "unlink": os.unlink,
            "lchown": lambda path: os.chown(path, 1, 1, follow_symlinks=False),
            "utimes": lambda path: os.utime(path, follow_symlinks=False),
        }
        assert answers(links, tag / "link") == {}
        exchange = {"over another": lambda path: os.rename(path, tag / "vmstate")}
        assert answers(exchange, memory) == {}
        for path, (status, content) in before.items():
            assert path.read_bytes() == content, path
            now = path.stat()
            assert now[:9] == status[:9], path
        assert memory.read_bytes() == MEMORY


@pytest.mark.parametrize("options", [(), ("--open-rw",)], ids=["ordinary", "open-rw"])
def test_an_explicit_view_refuses_too(
    public_path: Path, mountpoint: Path, options: tuple[str, ...]
) -> None:
    paths = [write_layer(public_path / f"{n}.mem", SIZE, LAYERS[n]) for n in (0, 1)]
    names = ["--base", str(paths[0]), "--diff", str(paths[1])]
    with unchanged(paths), mounted(None, mountpoint, *names, *options):
        view = mountpoint / "0.mem"
        assert answers(FILE_CHANGES, view) == {}
        assert answers(FOLDER_CHANGES, mountpoint) == {}
        for script in ('echo x > "$1"', 'echo x >> "$1"', ': > "$1"'):
            assert shell(script, view).returncode != 0
        script = 'dd if=/dev/zero of="$1" bs=1 count=1 conv=notrunc'
        assert shell(script, view).returncode != 0
        for command in (["fallocate", "-l", str(2 * SIZE)], ["fallocate", "-p", "-l", "4096"]):
            run = subprocess.run([*command, view], capture_output=True, timeout=60)
            assert run.returncode != 0, command
        assert view.read_bytes() == MEMORY


def test_a_read_only_handle_cannot_be_used_to_write(public_path: Path, mountpoint: Path) -> None:
    store = public_path / "store"
    paths = write_store(store)
    with unchanged(paths), mounted(store, mountpoint):
        memory = mountpoint / "child" / "memory.bin"
        fd = os.open(memory, os.O_RDONLY)
        try:
            for change in (
                lambda: os.write(fd, b"x"),
                lambda: os.pwrite(fd, b"x", 0),
                lambda: os.ftruncate(fd, 0),
                lambda: os.posix_fallocate(fd, 0, 2 * SIZE),
            ):
                with pytest.raises(OSError) as refused:
                    change()
                assert refused.value.errno in (errno.EBADF, errno.EINVAL, errno.EROFS)
            for change in (lambda: os.fchmod(fd, 0o777), lambda: os.fchown(fd, 1, 1)):
                with pytest.raises(OSError) as refused:
                    change()
                assert refused.value.errno == errno.EROFS
            os.fsync(fd)
            assert os.pread(fd, SIZE, 0) == MEMORY
        finally:
            os.close(fd)
        handle = os.open(memory, os.O_PATH)
        assert answers(WRITING_OPENS, Path(f"/proc/self/fd/{handle}")) == {}
        os.close(handle)
