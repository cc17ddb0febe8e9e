"""Typical mistakes: each gets one line with the next step, and the documented exit code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from diffmergefs.cli.verbs import ALIASES, TABLE
from tests.support import skips
from tests.support.commands import DENIED, diffmergefs, diffmergefs_as_nobody, one_line
from tests.support.images import PAGE, write_layer
from tests.support.inputs import unchanged
from tests.support.live import held
from tests.support.mounts import mounted
from tests.support.namespaces import private_mounts
from tests.support.places import DOCS
from tests.support.stores import BASE_PAGES, SIZE, age, pages, write_chain, write_numbered

TIB = 1 << 40


class Mistake(NamedTuple):
    """A wrong call, the exit code, and what the line must say. `{d}` is the current directory."""

    call: str
    code: int
    says: str


MISTAKES = {
    # Typos
    "verb": Mistake("flaten snapshots/work", 2, "no such command: flaten; did you mean flatten?"),
    "verb asked for": Mistake("help unmont", 2, "no such command: unmont; did you mean unmount?"),
    "unknown verb": Mistake("xyzzy", 2, "no such command: xyzzy; see diffmergefs --help"),
    "option": Mistake("list --jsn snapshots", 2, "no such option --jsn; did you mean --json?"),
    "one hyphen": Mistake("info -base mem_file", 2, "no such option -base; did you mean --base?"),
    "option of another verb": Mistake(
        "list --reflink snapshots", 2, "no such option --reflink; see diffmergefs list --help"
    ),
    "value": Mistake("list --layout=numberd snapshots", 2, "'numberd' is not one of 'forkd'"),
    "size": Mistake("list --page-size=5000 snapshots", 2, "5000 is not a power of two of at least"),
    "unit": Mistake("list --page-size=4kk snapshots", 2, "'4kk' is not a size like 4096, 0x1000"),
    "range": Mistake("map snapshots/work --range=1M", 2, "'1M' is not START:END; see diffmergefs"),
    "path": Mistake("list snapshot", 14, "No such file or directory; did you mean snapshots?"),
    "tag": Mistake("info snapshots/wrok", 14, "; the snapshots there are base, leaf, work"),
    "tag of a chain": Mistake(
        "squash snapshots/leaf --from wurk -o new",
        2,
        "--from wurk is not a tag of the chain base, work, leaf; see diffmergefs squash --help",
    ),
    # Something is missing
    "no MOUNTPOINT": Mistake("mount snapshots", 2, "MOUNTPOINT is missing: the directory to mount"),
    "no SOURCE": Mistake("list", 2, "Missing argument 'SOURCE'; see diffmergefs list --help"),
    "no IMAGE": Mistake("info", 2, "give either IMAGE or --base FILE [--diff FILE ...]; see"),
    "no output": Mistake("flatten snapshots/work", 2, "Missing option '-o' / '--output'; see"),
    "no base": Mistake("info --diff mem_diff", 2, "--diff needs --base; see"),
    "no value": Mistake("info --base", 2, "Option '--base' requires an argument; see"),
    "missing file": Mistake(
        "info --base mem_file --diff mem_dif", 14, "mem_dif: No such file or directory; did you"
    ),
    "missing mountpoint": Mistake(
        "mount snapshots nowhere", 10, "nowhere: No such file or directory; a mountpoint is an"
    ),
    "missing directory of the output": Mistake(
        "flatten snapshots/work -o no/such/file", 14, "No such file or directory: no/such; make the"
    ),
    # The wrong order
    "option before the verb": Mistake(
        "--json list snapshots", 2, "options stand after the command; type diffmergefs list --json"
    ),
    "files after one --diff": Mistake(
        "mount --base mem_file --diff mem_diff second mnt", 2, "give one --diff for each file"
    ),
    "more files after one --diff": Mistake(
        "info --base mem_file --diff mem_diff second third",
        2,
        "unexpected argument third; give one --diff for each file",
    ),
    "files after one --b-diff": Mistake(
        "compare mem_file mem_file --b-diff mem_diff second", 2, "give one --b-diff for each file"
    ),
    "mountpoint first": Mistake(
        "mount mnt snapshots", 10, "a mountpoint is an empty directory, and comes after SOURCE"
    ),
    "diff as base": Mistake(
        "info --base mem_diff --diff dense", 6, "if it is a complete image, say so with --dense"
    ),
    "base applied to diff": Mistake("apply dense mem_diff", 6, "are the two swapped? DIFF comes"),
    "newer tag first": Mistake(
        "squash snapshots/leaf --from leaf --to work -o new", 2, "--from leaf is newer than --to"
    ),
    # A file for a directory, and the reverse
    "file as SOURCE": Mistake("list mem_file", 14, "a file, not a directory of snapshots; mount,"),
    "file as MOUNTPOINT": Mistake("mount snapshots mem_file", 10, "Not a directory; a mountpoint"),
    "directory as layer": Mistake(
        "info --base snapshots", 14, "a directory, not a regular file; name a file"
    ),
    "directory as output": Mistake(
        "flatten snapshots/work -o empty", 8, "exists and is no regular file; choose another output"
    ),
    "store as IMAGE": Mistake(
        "info snapshots", 3, "is a directory of 3 snapshots, not one of them; name one: "
    ),
    "layer as IMAGE": Mistake("info mem_diff", 14, "; name its layers with --base and --diff"),
    # Outputs
    "output that exists": Mistake(
        "flatten snapshots/work -o mem_diff", 8, "choose another output, or replace it with --force"
    ),
    "output that is a layer": Mistake(
        "flatten layers/001-work.mem --force -o layers/000-base.mem", 8, "; choose another output"
    ),
    "a pipe as output": Mistake(
        "flatten snapshots/work -o -", 2, "a pipe has no holes, and the output is a sparse file;"
    ),
    "a device as output": Mistake(
        "flatten snapshots/work -o /dev/full", 8, "is no regular file; choose another output"
    ),
    "picture of a kind": Mistake(
        "map snapshots/work -o map.gif", 2, "must end in .png or .svg; see"
    ),
    # What cannot be merged, unmounted or read
    "sizes": Mistake("info --base mem_file --diff bigger", 4, "must have the same size"),
    "empty file": Mistake("info --base nothing", 4, "is empty (0 bytes); a layer has the guest's"),
    "one file twice": Mistake(
        "info --base mem_file --diff mem_file", 3, "the same file as the layer mem_file; give the"
    ),
    "another format": Mistake("info --base disk.qcow2", 22, "qcow2"),
    "layer of a store as BASE": Mistake(
        "apply mem_diff layers/000-base.mem", 8, "give a copy that is yours alone, or, if you are"
    ),
    "no mountpoint of ours": Mistake(
        "umount empty", 10, "not a diffmergefs mount point; `diffmergefs status` lists the mounts"
    ),
    "blanks and Unicode": Mistake(
        "info --base {d}/a%20b/Schichtü.mem",
        14,
        "a b/Schichtü.mem: No such file or directory; did you mean {d}/a b/Schicht ü.mem?",
    ),
}


@pytest.fixture
def directory(public_path: Path) -> Path:
    """The current directory of a call: two stores, loose layers, and what is no layer."""
    write_chain(public_path / "snapshots", ["base", "work", "leaf"])
    write_numbered(public_path / "layers", ["000-base.mem", "001-work.mem"])
    for name in ("mnt", "empty", "a b"):
        (public_path / name).mkdir()
    write_layer(public_path / "mem_file", SIZE, pages(0, BASE_PAGES))
    for name in ("mem_diff", "second", "third"):
        write_layer(public_path / name, SIZE, pages(1, [1]))
    write_layer(public_path / "dense", SIZE, pages(1, range(16)))
    write_layer(public_path / "bigger", SIZE + PAGE, pages(1, [1]))
    write_layer(public_path / "a b" / "Schicht ü.mem", SIZE, pages(1, [1]))
    (public_path / "nothing").touch()
    (public_path / "disk.qcow2").write_bytes(b"QFI\xfb\0\0\0\3" + bytes(SIZE))
    age(*(path for path in public_path.rglob("*") if path.is_file()))
    return public_path


def documented(verb: str, code: int) -> bool:
    """Whether the page of the verb lists the exit code."""
    name = ALIASES.get(verb, verb)
    page = DOCS / (f"diffmergefs-{name}.md" if name in TABLE else "diffmergefs.md")
    status = page.read_text(encoding="utf-8").split("## EXIT STATUS")[1]
    return re.search(rf"^- `{code}`: ", status, re.MULTILINE) is not None


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_the_next_step(name: str, directory: Path) -> None:
    mistake = MISTAKES[name]
    words = [word.format(d=directory).replace("%20", " ") for word in mistake.call.split()]
    before = sorted(directory.rglob("*"))
    with unchanged(path for path in before if path.is_file()):
        line = one_line(diffmergefs(*words, cwd=directory), mistake.code)
    assert mistake.says.format(d=directory) in line
    # The step stands behind what is wrong.
    assert line.rpartition("; ")[2].strip()
    assert documented(words[0], mistake.code)
    assert sorted(directory.rglob("*")) == before


# With another machine, user or terminal


def test_no_permission_to_read_or_to_write(directory: Path) -> None:
    (directory / "mem_file").chmod(0o600)
    layer, new = directory / "mem_file", directory / "new"
    line = one_line(diffmergefs_as_nobody("info", "--base", layer), 14)
    assert line == f"diffmergefs: {layer}: {DENIED}\n"
    done = diffmergefs_as_nobody("flatten", directory / "snapshots/work", "-o", new)
    assert one_line(done, 14) == f"diffmergefs: {new}: {DENIED}\n"
    (directory / "snapshots").chmod(0o700)
    line = one_line(diffmergefs_as_nobody("info", directory / "snapshots/work"), 14)
    assert line == f"diffmergefs: {directory}/snapshots/work: {DENIED}\n"
    assert documented("info", 14) and documented("flatten", 14)


def test_no_device_of_fuse(directory: Path, public_path: Path) -> None:
    (public_path / "dev").mkdir()
    with private_mounts(public_path / "dev") as namespace:
        namespace.bind(Path("/dev/null"), "/dev/fuse")
        words = ("mount", "--log=/dev/null", directory / "snapshots", directory / "mnt")
        line = one_line(namespace.diffmergefs(0, 0, *words), 11)
    assert "/dev/fuse" in line and "; " in line
    assert documented("mount", 11)


def test_a_mount_that_is_stale_busy_or_there_already(directory: Path) -> None:
    store, path = directory / "snapshots", directory / "mnt"
    with mounted(store, path) as mount:
        line = one_line(diffmergefs("mount", "--log=/dev/null", store, path), 10)
        assert f"{path}: {store} is mounted there already" in line and "; " in line
        line = one_line(diffmergefs("umount", path / "work"), 10)
        assert f"lies in the mount on {path}; name {path}\n" in line
        line = one_line(diffmergefs("umount", store), 10)
        assert f"is mounted on {path}; name {path}\n" in line
        with held(path / "work" / "memory.bin"):
            line = one_line(diffmergefs("umount", path), 15)
            assert "; stop the VMs that use it, or detach it with --lazy" in line
        mount.kill()
        line = one_line(diffmergefs("status", path), 11)
        assert "stale mount: its daemon died; unmount it or mount it again" in line
        line = one_line(diffmergefs("info", path / "work"), 14)
        assert "a stale mount, whose daemon died; remove it with `diffmergefs umount" in line
    assert documented("umount", 15) and documented("status", 11)


def test_a_disk_of_one_mib(directory: Path) -> None:
    skips.require_mounts()
    small = directory / "mnt"
    size = 4 << 20
    base = write_layer(directory / "big.mem", size, [(0, b"x" * size)])
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "small", small], check=True)
    line = one_line(diffmergefs("flatten", "--base", base, "-o", small / "out"), 9)
    assert f"{small}/out: " in line and str(size) in line and "; " in line
    assert os.listdir(small) == []
    assert documented("flatten", 9)


def test_layers_of_one_tib(directory: Path, filesystem: Callable[[str], Path]) -> None:
    """They are merged like any other; no output fits on a disk that is smaller."""
    place = filesystem("xfs")
    base = write_layer(place / "base", TIB, [(0, b"b" * PAGE), (TIB - PAGE, b"b" * PAGE)])
    diff = write_layer(place / "diff", TIB, [(TIB // 2, b"d" * PAGE)])
    done = diffmergefs("info", "--base", base, "--diff", diff)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"2 layers, {TIB} bytes (1 TiB), " in done.stdout
    done = diffmergefs("flatten", "--base", base, "--diff", diff, "-o", place / "whole")
    assert (done.returncode, done.stderr) == (0, "")
    assert (place / "whole").stat().st_size == TIB
    other = write_layer(place / "other", 2 * TIB, [(0, b"d" * PAGE)])
    line = one_line(diffmergefs("info", "--base", base, "--diff", other), 4)
    assert f"{other}: {2 * TIB} bytes, but {base} has {TIB}; " in line
    (place / "whole").unlink()
    call = f"-m diffmergefs flatten --base {base} --diff {diff} -o {place}/whole"
    done = subprocess.run(
        ["/bin/sh", "-c", f'ulimit -f 2048; exec "{sys.executable}" {call}'],
        capture_output=True,
        text=True,
        check=False,
    )
    step = "File too large; write it where there is more space"
    assert one_line(done, 14) == f"diffmergefs: {place}/whole: {step}\n"
    huge = write_layer(place / "huge", 17 * TIB, [(0, b"b" * PAGE)])
    line = one_line(diffmergefs("info", "--base", huge), 4)
    assert f"{huge}: {17 * TIB} bytes, more than the {16 * TIB} (16 TiB)" in line and "; " in line
    assert not (place / "whole").exists()
    for path in (base, diff, other, huge):
        path.unlink()


@pytest.mark.parametrize(
    ("stdout", "code", "says"),
    [
        ("/dev/full", 14, "output: No space left on device; write it where there is more space"),
        (None, 0, ""),
    ],
    ids=["full", "closed"],
)
def test_a_stdout_that_takes_nothing(
    directory: Path, stdout: str | None, code: int, says: str
) -> None:
    """A closed one is as good as /dev/null: a service manager may start a program so."""
    command = f'exec "{sys.executable}" -m diffmergefs list snapshots >{stdout or "&-"}'
    done = subprocess.run(
        ["/bin/sh", "-c", command], capture_output=True, text=True, cwd=directory, check=False
    )
    assert done.returncode == code
    assert done.stderr == (f"diffmergefs: {says}\n" if says else "")
