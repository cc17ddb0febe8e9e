"""--open-rw: a read-write open succeeds, and still nothing can be changed."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.inputs import unchanged
from tests.support.mounts import mounted

SIZE = 300 * PAGE + 5
LAYERS = [
    [(0, signed(0, 0, 200 * PAGE))],
    [(8 * PAGE, signed(1, 8 * PAGE, 4 * PAGE)), (20 * PAGE, bytes(PAGE))],
    [(300 * PAGE, signed(2, 300 * PAGE, 5))],
]
MEMORY = overlay_oracle(SIZE, LAYERS)

# Maps the file in one of the ways in which VMMs do, writes into every page of its own copy, and
# says what it saw before.
PRIVATE = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
view = mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
os.close(fd)
seen = view[:]
for offset in range(0, len(view), mmap.PAGESIZE):
    view[offset] = 0xEE
sys.stdout.buffer.write(seen)
"""

# A mapping of which only the first half was touched when something else happens to the file.
LIVE = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY if sys.argv[2] == 'r' else os.O_RDWR)
view = mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
half = len(view) // 2
first = view[:half]
print('mapped', flush=True)
sys.stdin.readline()
# No stat comes between: what was refused must not have touched the file at all.
sys.exit(0 if first + view[half:] == open(sys.argv[3], 'rb').read() and first == view[:half] else 3)
"""


def write_layers(folder: Path) -> tuple[list[Path], list[str]]:
    paths = [write_layer(folder / f"{n}.mem", SIZE, extents) for n, extents in enumerate(LAYERS)]
    return paths, ["--base", str(paths[0]), "--diff", str(paths[1]), "--diff", str(paths[2])]


def private_read(path: Path) -> bytes:
    done = subprocess.run([sys.executable, "-c", PRIVATE, path], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_private_mapping_of_a_read_write_handle_is_right(
    public_path: Path, mountpoint: Path
) -> None:
    paths, options = write_layers(public_path)
    with unchanged(paths), mounted(None, mountpoint, *options, "--open-rw"):
        view = mountpoint / "0.mem"
        mode = view.stat().st_mode & 0o777
        # w wherever there is r, and nowhere else.
        assert mode & 0o444 and mode & 0o222 == (mode & 0o444) >> 1
        for _ in range(2):
            assert private_read(view) == MEMORY
        assert view.read_bytes() == MEMORY
        with view.open("r+b", buffering=0) as file:
            for offset, length in ((0, SIZE), (1, 2 * PAGE), (SIZE - 3, 10), (SIZE, 1)):
                window = MEMORY[offset : offset + length]
                assert os.pread(file.fileno(), length, offset) == window
            assert file.read(SIZE + 1) == MEMORY


def test_a_shared_writable_mapping_is_refused(public_path: Path, mountpoint: Path) -> None:
    paths, options = write_layers(public_path)
    with unchanged(paths), mounted(None, mountpoint, *options, "--open-rw"):
        view = mountpoint / "0.mem"
        with view.open("rb") as reader, view.open("r+b", buffering=0) as file:
            known = mmap.mmap(reader.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
            for protection in (mmap.PROT_READ | mmap.PROT_WRITE, mmap.PROT_WRITE, mmap.PROT_READ):
                with pytest.raises(OSError) as refused:
                    mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, protection)
                assert refused.value.errno == errno.ENODEV
            # From a read-only handle a shared mapping cannot be written.
            with pytest.raises(PermissionError):
                mmap.mmap(reader.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_WRITE)
            for change in (
                lambda: os.pwrite(file.fileno(), b"x", 0),
                lambda: os.pwrite(file.fileno(), b"x" * 3 * PAGE, SIZE - PAGE),
                lambda: os.write(file.fileno(), b"x"),
                lambda: os.ftruncate(file.fileno(), 0),
                lambda: os.ftruncate(file.fileno(), SIZE),
                lambda: os.fchmod(file.fileno(), 0o600),
            ):
                with pytest.raises(OSError) as refused:
                    change()
                assert refused.value.errno == errno.EROFS
            with pytest.raises(OSError) as refused:
                os.posix_fallocate(file.fileno(), 0, 2 * SIZE)
            assert refused.value.errno in (errno.EROFS, errno.EOPNOTSUPP)
            with (public_path / "other").open("w+b") as other:
                other.write(b"x" * PAGE)
                other.flush()
                with pytest.raises(OSError):
                    os.copy_file_range(other.fileno(), file.fileno(), PAGE, 0, 0)
            os.fsync(file.fileno())
            assert known[:] == MEMORY
            known.close()
            with view.open("ab", buffering=0) as end, pytest.raises(OSError) as refused:
                end.write(b"x")
            assert refused.value.errno == errno.EROFS
        assert view.read_bytes() == MEMORY
        assert view.stat().st_size == SIZE


@pytest.mark.parametrize("how", ["r", "rw"])
def test_a_refused_truncation_leaves_live_mappings_alone(
    public_path: Path, mountpoint: Path, how: str
) -> None:
    paths, options = write_layers(public_path)
    expected = public_path / "expected"
    expected.write_bytes(MEMORY)
    with unchanged(paths), mounted(None, mountpoint, *options, "--open-rw"):
        view = mountpoint / "0.mem"
        command: list[str | Path] = [sys.executable, "-c", LIVE, view, how, expected]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as vmm:
            try:
                assert vmm.stdout is not None
                assert vmm.stdout.readline() == b"mapped\n"
                for flags in (os.O_RDWR, os.O_WRONLY, os.O_RDONLY):
                    with pytest.raises(OSError) as refused:
                        os.open(view, flags | os.O_TRUNC)
                    assert refused.value.errno == errno.EROFS
                for script in (': > "$1"', 'echo x > "$1"', 'echo x >> "$1"', 'truncate -s0 "$1"'):
                    done = subprocess.run(
                        ["sh", "-c", script, "sh", view], capture_output=True, timeout=60
                    )
                    assert done.returncode != 0, script
                assert private_read(view) == MEMORY
                vmm.communicate(b"\n", timeout=60)
                assert vmm.returncode == 0
            finally:
                vmm.kill()
        assert view.stat().st_size == SIZE


def test_tags_can_be_opened_read_write_and_their_other_files_not(
    public_path: Path, mountpoint: Path
) -> None:
    store = public_path / "store"
    store.mkdir()
    for n, extents in enumerate(LAYERS):
        write_layer(store / f"{n:03}-t{n}.mem", SIZE, extents)
    (store / "002-t2.vmstate").write_bytes(b"state")
    (store / "000-t0.mem").chmod(0o440)
    files = [path for path in store.iterdir() if path.is_file()]
    with unchanged(files), mounted(store, mountpoint, "--open-rw"):
        for n in range(3):
            view = mountpoint / f"t{n}" / f"{n:03}-t{n}.mem"
            assert private_read(view) == overlay_oracle(SIZE, LAYERS[: n + 1])
            assert view.stat().st_mode & 0o777 == 0o660
        state = mountpoint / "t2" / "002-t2.vmstate"
        with pytest.raises(OSError) as refused:
            os.open(state, os.O_RDWR)
        assert refused.value.errno == errno.EROFS
        assert state.read_bytes() == b"state"


def test_without_the_option_a_read_write_open_fails(public_path: Path, mountpoint: Path) -> None:
    paths, options = write_layers(public_path)
    with unchanged(paths), mounted(None, mountpoint, *options):
        view = mountpoint / "0.mem"
        assert view.stat().st_mode & 0o222 == 0
        for flags in (os.O_RDWR, os.O_WRONLY):
            with pytest.raises(OSError) as refused:
                os.open(view, flags)
            assert refused.value.errno == errno.EROFS
        assert view.read_bytes() == MEMORY
