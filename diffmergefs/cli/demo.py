"""`demo`: run the main commands on a small chain made for the purpose."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import click

from diffmergefs.cli.output import print_json
from diffmergefs.cli.temporarymount import temporary_mount
from diffmergefs.core.errors import VerificationError
from diffmergefs.core.extents import PAGE
from diffmergefs.opening.images import open_image
from diffmergefs.system import mountpoint as mountpoints
from diffmergefs.writing.flatten import flatten

PAGES = 1024


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the steps as JSON.")
def demo(as_json: bool) -> None:
    """Make a small chain, then mount, read, flatten, compare and unmount it. Print each step.

    Everything happens in a temporary directory, which is removed.

    \b
    Example:
      diffmergefs demo
    """
    folder = Path(os.path.realpath(tempfile.mkdtemp(prefix="diffmergefs-demo-")))
    done: list[str] = []

    def report(text: str) -> None:
        done.append(text)
        if not as_json:
            click.echo(f"{len(done)}. {text}")

    try:
        _run(folder, report)
    finally:
        shutil.rmtree(folder)
    if as_json:
        print_json({"steps": done, "ok": True})


def _run(folder: Path, report: Callable[[str], None]) -> None:
    store, view, flat = folder / "store", folder / "view", folder / "flat.mem"
    store.mkdir()
    view.mkdir()
    expected = _make_chain(store)
    report(
        f"made {', '.join(sorted(os.listdir(store)))}: {len(expected)} bytes each, the last two"
        " sparse"
    )
    stored = sum(path.stat().st_blocks * 512 for path in store.iterdir())
    with temporary_mount(view, f"--state-dir={folder / 'state'}", str(store)):
        report(f"mounted them; {len(os.listdir(view))} snapshots are visible")
        merged = view / "numpy" / "002-numpy.mem"
        _require_equal(merged, expected)
        digest = hashlib.sha256(expected).hexdigest()
        report(f"read numpy/002-numpy.mem: complete and correct, sha256 {digest[:16]}...")
        with open_image(store / "002-numpy.mem").view as opened:
            result = flatten(opened, flat)
        _require_equal(flat, expected)
        report(
            f"flattened it: {sum(result.copied)} bytes copied, {sum(result.shared)} shared,"
            f" {result.holes} holes; equal to the view"
        )
        mountpoints.unmount(str(view))
    report(f"unmounted; the chain took {stored} bytes on disk, and mounting it copied none")


def _make_chain(store: Path) -> bytes:
    # Each page contains the name of its layer. numpy has a page of zeros: zeros are data.
    image = bytearray(PAGES * PAGE)
    layers = {
        "000-boot.mem": dict.fromkeys(range(0, PAGES, 2), b"boot"),
        "001-python.mem": dict.fromkeys(range(0, PAGES, 50), b"python"),
        "002-numpy.mem": {**dict.fromkeys(range(25, PAGES, 100), b"numpy"), 2: b"\0"},
    }
    for name, pages in layers.items():
        with open(store / name, "wb") as file:
            file.truncate(len(image))
            for number, word in pages.items():
                content = (word * PAGE)[:PAGE]
                os.pwrite(file.fileno(), content, number * PAGE)
                image[number * PAGE : (number + 1) * PAGE] = content
    return bytes(image)


def _require_equal(path: Path, expected: bytes) -> None:
    if path.read_bytes() != expected:
        raise VerificationError(f"{path.name}: differs from the image that was made")
