"""`flatten`, `apply` and `demo` from the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffmergefs import cli
from diffmergefs.cli import write
from diffmergefs.core.view import MergedView
from diffmergefs.writing.flatten import FlattenResult, flatten
from tests.support.commands import (
    DENIED,
    diffmergefs,
    diffmergefs_as_nobody,
    mistake,
    one_line,
    succeed,
    unsized,
)
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.inputs import unchanged
from tests.support.stores import BASE_PAGES, SIZE, age, pages, write_chain, write_numbered

EXTENTS = [pages(0, BASE_PAGES), pages(1, [1]), pages(2, [2])]
MERGED = overlay_oracle(SIZE, EXTENTS)


@pytest.fixture
def store(public_path: Path) -> Path:
    return write_chain(public_path / "store", ["base", "work", "leaf"])


def layers(store: Path) -> list[Path]:
    return [store / tag / "memory.bin" for tag in ("base", "work", "leaf")]


def test_flatten_writes_the_view_out_and_tells_the_bytes(store: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.mem"
    with unchanged(layers(store)):
        text = unsized(succeed("flatten", store / "leaf", "-o", output, "--verify"))
    assert output.read_bytes() == MERGED
    rows = [line.split() for line in text.splitlines()]
    assert rows[0] == ["LAYER", "COPIED", "SHARED"]
    paths = [f"{store}/{tag}/memory.bin" for tag in ("base", "work", "leaf")]
    assert [row[0] for row in rows[1:4]] == paths
    moved = [int(row[1]) + int(row[2]) for row in rows[1:4]]
    assert moved == [13 * PAGE, PAGE, PAGE]
    assert text.endswith(f", {PAGE} in holes, verified\n")
    assert text.splitlines()[4].startswith(f"{output}: {SIZE} bytes, ")


def test_flatten_as_json(store: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.mem"
    found = json.loads(succeed("flatten", "--json", store / "leaf", "-o", output))
    assert (found["output"], found["size"], found["holes"]) == (str(output), SIZE, PAGE)
    assert [layer["path"] for layer in found["layers"]] == [
        f"{store}/{tag}/memory.bin" for tag in ("base", "work", "leaf")
    ]
    assert sum(layer["copied"] + layer["shared"] for layer in found["layers"]) == 15 * PAGE


def test_flatten_of_numbered_and_of_explicit_layers(tmp_path: Path) -> None:
    source = write_numbered(tmp_path / "s", ["000-base.mem", "001-work.mem", "002-leaf.mem"])
    base, work, leaf = sorted(source.iterdir())
    succeed("flatten", leaf, "-o", tmp_path / "one")
    succeed("flatten", "--base", base, "--diff", work, "--diff", leaf, "-o", tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == MERGED


def test_flatten_replaces_an_output_only_with_force(store: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.mem"
    output.write_text("mine")
    assert "--force" in mistake(8, "flatten", store / "leaf", "-o", output)
    assert output.read_text() == "mine"
    succeed("flatten", store / "leaf", "-o", output, "--force")
    assert output.read_bytes() == MERGED


def test_flatten_never_writes_over_its_own_layer(store: Path) -> None:
    base = store / "base" / "memory.bin"
    with unchanged(layers(store)):
        mistake(8, "flatten", store / "leaf", "-o", base, "--force")


def test_flatten_where_nobody_may_write_is_one_line(store: Path, public_path: Path) -> None:
    done = diffmergefs_as_nobody("flatten", store / "leaf", "-o", public_path / "out")
    assert one_line(done, 14) == f"diffmergefs: {public_path / 'out'}: {DENIED}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("has_name", [False, True])
def test_flatten_that_is_stopped_leaves_nothing(
    store: Path, tmp_path: Path, number: signal.Signals, has_name: bool
) -> None:
    stop_flatten(store, tmp_path, number, has_name)


def test_flatten_that_is_stopped_in_memory_leaves_nothing(
    store: Path, filesystem: Callable[[str], Path]
) -> None:
    """There a thread writes, and what it has begun is waited for."""
    stop_flatten(store, filesystem("tmpfs"), signal.SIGTERM, True)


def stop_flatten(store: Path, place: Path, number: signal.Signals, has_name: bool) -> None:
    # Held at its first write, so that the signal surely comes in the middle. Without O_RDWR the
    # kernel refuses O_TMPFILE, and the file being written has a temporary name.
    (place / "hold").mkdir()
    code = (
        "import os, sys, time\n"
        "from diffmergefs import cli\n"
        "from diffmergefs.writing import copying, output\n"
        f"output._UNNAMED &= ~({has_name} * os.O_RDWR)\n"
        "def hold(*_):\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(5)\n"
        "copying.os.pwrite = copying.os.copy_file_range = hold\n"
        "copying.os.sendfile = copying.os.pwritev = hold\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    output = place / "hold" / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "flatten", str(store / "leaf"), "-o", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        assert len(os.listdir(place / "hold")) == has_name
        process.send_signal(number)
        _, complaint = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in complaint
    assert os.listdir(place / "hold") == []


def test_a_layer_that_changes_under_flatten_is_one_line_and_leaves_nothing(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    base = layers(store)[0]
    real = flatten

    def change_and_flatten(view: MergedView, *arguments: Any, **options: Any) -> FlattenResult:
        age(base, mtime_ns=1)
        return real(view, *arguments, **options)

    monkeypatch.setattr(write, "flatten_view", change_and_flatten)
    assert cli.main(["flatten", str(store / "leaf"), "-o", str(tmp_path / "out")]) == 7
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"diffmergefs: {base}: the layer changed while in use: its mtime")
    assert not (tmp_path / "out").exists()


def test_apply_tells_what_trust_grain_overrides(store: Path, tmp_path: Path) -> None:
    whole = write_layer(tmp_path / "whole.mem", SIZE, EXTENTS[0])
    work = layers(store)[1]
    done = diffmergefs("apply", "--trust-grain", "--page-size=16384", work, whole)
    assert (done.returncode, done.stdout) == (0, f"{PAGE} bytes (4 KiB) copied\n")
    assert done.stderr.startswith("diffmergefs: --trust-grain overrides the check of alignment")
    assert done.stderr.count("\n") == 1


def test_apply_merges_in_place_and_prints_the_bytes(store: Path, tmp_path: Path) -> None:
    whole = write_layer(tmp_path / "whole.mem", SIZE, EXTENTS[0])
    for diff in layers(store)[1:]:
        with unchanged([diff]):
            assert succeed("apply", diff, whole, "--sync") == f"{PAGE} bytes (4 KiB) copied\n"
    assert whole.read_bytes() == MERGED


def test_apply_refuses_without_touching_the_base(store: Path, tmp_path: Path) -> None:
    base = write_layer(tmp_path / "base", SIZE, EXTENTS[0])
    dense = write_layer(tmp_path / "dense", SIZE, [(0, signed(1, 0, SIZE))])
    longer = write_layer(tmp_path / "longer", SIZE + PAGE, pages(1, [1]))
    with unchanged([base]):
        assert "--dense" in mistake(6, "apply", dense, base)
        line = mistake(4, "apply", longer, base)
        assert str(SIZE) in line and str(SIZE + PAGE) in line
        mistake(8, "apply", base, base)
        assert "--trust-grain" in mistake(
            5, "apply", "--page-size=16384", store / "work" / "memory.bin", base
        )
        assert "--force=order" in mistake(8, "apply", dense, base, "--dense")
    done = diffmergefs("apply", dense, base, "--dense", "--force=order")
    assert (done.returncode, done.stdout) == (0, f"{SIZE} bytes (64 KiB) copied\n")
    assert done.stderr.startswith(f"diffmergefs: --force=order overrides: {base}: {dense} covers")


def test_apply_to_what_a_user_may_not_write_is_one_line(store: Path) -> None:
    base, work = layers(store)[:2]
    base.chmod(0o644)
    with unchanged([base]):
        done = diffmergefs_as_nobody("apply", "--force=layer", work, base)
        assert done.stderr.startswith("diffmergefs: --force=layer overrides: ")
        done.stderr = done.stderr.partition("\n")[2]
        assert one_line(done, 14) == f"diffmergefs: {base}: {DENIED}\n"
