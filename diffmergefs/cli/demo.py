"""`demo`: run the main commands on a small chain, in each of the forms that README uses."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import click

from diffmergefs.cli.doctor import temporary_mount
from diffmergefs.cli.options import DIRECTORY
from diffmergefs.cli.output import print_json
from diffmergefs.cli.usage import Verb
from diffmergefs.core.errors import OutputRefusedError, VerificationError
from diffmergefs.core.extents import PAGE
from diffmergefs.core.failures import Target, failures
from diffmergefs.opening.images import open_image
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.system import mounted
from diffmergefs.writing.flatten import flatten
from diffmergefs.writing.sealing import seal_layer

PAGES = 4096
TAGS = ("python", "numpy", "pandas")
#: What `make_files` makes, by name.
CONTENTS = {
    "snapshots": "a forkd store; its chain is python, numpy, pandas",
    "merged": "the same store, but pandas is a complete image in spite of its parent",
    "layers": "the same chain as numbered layers; 001-numpy.mem has a seal",
    "mem_file": "a full memory file, as Firecracker writes it, with its snapshot_file",
    "mem_diff": "a diff on top of mem_file, with its snapshot_diff",
    "views": "an empty directory to mount on",
}

_NEXT = (
    "diffmergefs list snapshots",
    "diffmergefs mount snapshots views",
    "ls -l views/pandas",
    "diffmergefs umount views",
    "diffmergefs map snapshots/pandas",
    "diffmergefs flatten --base mem_file --diff mem_diff -o whole.mem --verify",
    "diffmergefs rediff --store merged -o small",
)

# By number; what is missing is a hole.
_Pages = Mapping[int, bytes]


@click.command(cls=Verb)
@click.option(
    "--keep", type=DIRECTORY, metavar="DIR", help="Make the files in DIR, and leave them there."
)
@click.option("--json", "as_json", is_flag=True, help="Print the steps as JSON.")
def demo(keep: str | None, as_json: bool) -> None:
    """Make a small chain, then mount, read, flatten, compare and unmount it. Print each step.

    Everything happens in a temporary directory, which is removed. --keep leaves the files in DIR,
    which must be new or empty, and prints commands to try there.

    \b
    Examples:
      diffmergefs demo
      diffmergefs demo --keep demo
    """
    done: list[str] = []

    def report(text: str) -> None:
        done.append(text)
        if not as_json:
            click.echo(f"{len(done)}. {text}")

    with _directory(keep) as folder:
        _run(folder, report)
    commands = [] if keep is None else _commands(keep)
    if as_json:
        print_json({"steps": done, "kept": keep, "next": commands, "ok": True})
    elif keep is not None:
        click.echo(f"\nKept in {keep}:")
        width = max(map(len, CONTENTS)) + 2
        for name, text in CONTENTS.items():
            click.echo(f"  {name:{width}}{text}")
        click.echo("\nTry next:")
        for command in commands:
            click.echo(f"  {command}")
        click.echo("\nYou can also type the examples of README.md in this directory.")


@contextmanager
def _directory(keep: str | None) -> Iterator[Path]:
    # What is made is removed, except where it is kept and the demo succeeds.
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="diffmergefs-demo-") as temporary:
            yield Path(os.path.realpath(temporary))
        return
    folder = Path(keep)
    is_new = not os.path.lexists(folder)
    if not is_new and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputRefusedError(f"{keep}: exists, and is not an empty directory; name a new one")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    except BaseException:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if is_new:
            folder.rmdir()
        raise


def _run(folder: Path, report: Callable[[str], None]) -> None:
    views, work = folder / "views", folder / "work"
    work.mkdir()
    store, flat, state = folder / "snapshots", work / "flat.mem", str(work / "state")
    expected = make_files(folder)
    report(f"made a chain of {', '.join(TAGS)}: {PAGES * PAGE} bytes each, the last two sparse")
    with open_image(store / TAGS[-1], TrustPolicy(state_dir=state)).view as view:
        with temporary_mount(views, f"--state-dir={state}", str(store)):
            report(f"mounted it; {len(os.listdir(views))} snapshots are visible")
            _require_equal(views / TAGS[-1] / "memory.bin", expected)
            digest = hashlib.sha256(expected).hexdigest()
            report(f"read pandas/memory.bin: complete and correct, sha256 {digest[:16]}...")
            result = flatten(view, flat)
            _require_equal(flat, expected)
            report(
                f"flattened it: {sum(result.copied)} bytes copied, {sum(result.shared)} shared,"
                f" {result.holes} holes; equal to the view"
            )
            mounted.unmount(str(views))
        stored = sum(os.fstat(layer.fd).st_blocks * 512 for layer in view.layers)
    shutil.rmtree(work)
    report(f"unmounted; the chain took {stored} bytes on disk, and mounting it copied none")


def _commands(folder: str) -> list[str]:
    # As they are to be typed; first what makes `diffmergefs` the program that runs now.
    program = Path(sys.argv[0])
    if program.name != "diffmergefs":
        program = Path(sysconfig.get_path("scripts"), "diffmergefs")
    found = shutil.which("diffmergefs")
    commands = [f"cd {shlex.quote(folder)}", *_NEXT]
    if program.exists() and (found is None or not program.samefile(found)):
        commands.insert(0, f'export PATH={shlex.quote(os.path.abspath(program.parent))}:"$PATH"')
    return commands


def _require_equal(path: Path, expected: bytes) -> None:
    if path.read_bytes() != expected:
        raise VerificationError(f"{path.name}: differs from the image that was made")


def make_files(folder: Path) -> bytes:
    """Make the files in the directory; the bytes of the image `snapshots/pandas`.

    Each image has `PAGES` pages, and each page repeats the name of the layer that it belongs to.
    """
    numbers = (range(1024), range(100, 228), range(200, 264))
    layers = dict(zip(TAGS, map(_named, TAGS, numbers), strict=True))
    base, numpy, pandas = layers.values()
    zeros = dict.fromkeys(range(PAGES), bytes(PAGE))
    whole = {**zeros, **base, **numpy, **pandas}
    _write_store(folder / "snapshots", layers)
    _write_store(folder / "merged", {**layers, "pandas": whole})
    _write_numbered(folder / "layers", layers)
    (folder / "views").mkdir()
    # A full snapshot has all pages, whatever they hold. A page that the guest cleared is in a diff.
    _write(folder / "mem_file", {**zeros, **base})
    _write(folder / "mem_diff", {2: zeros[2], **numpy})
    for name in ("snapshot_file", "snapshot_diff"):
        (folder / name).write_text("the state of the devices\n", encoding="utf-8")
    return b"".join(whole[number] for number in range(PAGES))


def _named(name: str, numbers: range) -> _Pages:
    page = (name.encode() * PAGE)[:PAGE]
    return dict.fromkeys(numbers, page)


def _write(path: Path, pages: _Pages) -> None:
    with path.open("w+b") as file, failures(str(path), Target(file.fileno(), str(path))):
        file.truncate(PAGES * PAGE)
        for number, page in pages.items():
            os.pwrite(file.fileno(), page, number * PAGE)


def _write_store(store: Path, layers: Mapping[str, _Pages]) -> None:
    recorded: dict[str, str] = {}
    for tag, pages in layers.items():
        folder = store / tag
        folder.mkdir(parents=True)
        memory, state = folder / "memory.bin", folder / "vmstate"
        _write(memory, pages)
        state.write_text(f"the state of {tag}'s devices\n", encoding="utf-8")
        document = {"memory": str(memory), "vmstate": str(state), **recorded}
        text = json.dumps(document, indent=2)
        (folder / "snapshot.json").write_text(f"{text}\n", encoding="utf-8")
        with memory.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        recorded = {"parent_tag": tag, "parent_content_hash": digest}


def _write_numbered(folder: Path, layers: Mapping[str, _Pages]) -> None:
    folder.mkdir()
    names = ("000-base", "001-numpy", "002-pandas")
    for name, pages in zip(names, layers.values(), strict=True):
        _write(folder / f"{name}.mem", pages)
    seal_layer(folder / "001-numpy.mem")
    (folder / "002-pandas.vmstate").write_text("the state of the devices\n", encoding="utf-8")
