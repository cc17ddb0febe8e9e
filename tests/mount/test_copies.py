"""Which copies of a view stay sparse on this machine, as docs/copying.md says it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.project.test_docs import rows
from tests.support.coreutils import coreutils
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.mounts import mounted
from tests.support.places import DOCS

SIZE = 4096 * PAGE
LAYERS = [
    [(8 * PAGE, signed(0, 8 * PAGE, 20 * PAGE))],
    [(10 * PAGE, signed(1, 10 * PAGE, 3 * PAGE)), (SIZE - PAGE, signed(1, SIZE - PAGE, PAGE))],
]
#: The most that a sparse copy takes: some programs write units of 64 KiB.
SPARSE = 64 * PAGE

#: What copies "$1" to "$2". What lacks a name here is run as it stands in the table.
COMMANDS = {
    "diffmergefs flatten": '"$3" -m diffmergefs flatten --base "$4" --diff "$5" -o "$2"',
    "cat >": 'cat "$1" >"$2"',
    "tar": 'tar -C "${1%/*}" -cf - "${1##*/}" | tar -C "${2%/*}" -xf - && mv "$6" "$2"',
    "tar -S": 'tar -C "${1%/*}" -Scf - "${1##*/}" | tar -C "${2%/*}" -xf - && mv "$6" "$2"',
    "cpio --sparse": 'cd "${1%/*}" && echo "${1##*/}" | cpio --sparse -p "${2%/*}" && mv "$6" "$2"',
    "dd": 'dd if="$1" of="$2" bs=64K',
    "dd conv=sparse": 'dd if="$1" of="$2" bs=64K conv=sparse',
    "qemu-img convert": 'qemu-img convert -f raw -O raw "$1" "$2"',
    "qemu-img convert -S 0": 'qemu-img convert -S 0 -f raw -O raw "$1" "$2"',
}


def table() -> Iterator[tuple[str, str]]:
    """Each way to copy, and what becomes of a copy with this machine's coreutils."""
    for ways, older, newer in rows(DOCS / "copying.md", "Copies of a view"):
        for way in re.findall(r"`([^`]+)`", ways):
            yield way, older if coreutils() < (9, 7) else newer


def test_the_copies_of_a_view_take_what_the_table_says(public_path: Path, mountpoint: Path) -> None:
    base, diff = (write_layer(public_path / f"{n}.mem", SIZE, LAYERS[n]) for n in range(2))
    copy, unpacked = public_path / "copies" / "copy", public_path / "copies" / base.name
    copy.parent.mkdir()
    wanted, found = dict(table()), {}
    with mounted(None, mountpoint, "--base", str(base), "--diff", str(diff)):
        arguments = (mountpoint / base.name, copy, sys.executable, base, diff, unpacked)
        for way in wanted:
            command = COMMANDS.get(way, f'{way} "$1" "$2"')
            done = subprocess.run(
                ["sh", "-c", command, "sh", *arguments], capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 0, (command, done.stderr)
            assert copy.read_bytes() == overlay_oracle(SIZE, LAYERS), command
            size = copy.stat().st_blocks * 512
            assert size <= SPARSE or size >= SIZE, (command, size)
            found[way] = "sparse" if size <= SPARSE else "full size"
            copy.unlink()
    assert found == wanted
