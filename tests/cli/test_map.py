"""`map`: in the terminal, as JSON like that of qemu-img, as a picture; and what it refuses."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffmergefs.core import errors
from diffmergefs.pictures import map_picture  # noqa: F401  (another user may not import it later)
from tests.support.commands import diffmergefs, diffmergefs_as_nobody, mistake, one_line, unsized
from tests.support.images import PAGE, signed, write_layer
from tests.support.inputs import unchanged
from tests.support.stores import write_chain

SIZE = 256 * PAGE


@pytest.fixture
def layers(tmp_path: Path) -> list[Path]:
    """A base of 192 pages; 'one' has scattered pages, 'two' a block, and 4 pages of zeros."""
    contents = {
        "base": [(0, signed(0, 0, 192 * PAGE))],
        "one": [(n * PAGE, signed(1, n * PAGE, PAGE)) for n in (0, 5, 6, 7, 100, 255)],
        "two": [(8 * PAGE, bytes(4 * PAGE)), (128 * PAGE, signed(2, 128 * PAGE, 8 * PAGE))],
    }
    return [write_layer(tmp_path / name, SIZE, data) for name, data in contents.items()]


@pytest.fixture
def chain(layers: list[Path]) -> list[str]:
    return named(layers)


def named(layers: Sequence[Path]) -> list[str]:
    """As --base and --diff."""
    return [f"--base={layers[0]}", *(f"--diff={path}" for path in layers[1:])]


def shown(*arguments: str | Path, **environment: str) -> str:
    """What `map` prints, 80 columns wide unless it is said otherwise."""
    environment = {"LC_ALL": "C.UTF-8", "COLUMNS": "80"} | environment
    done = diffmergefs("map", *arguments, cwd=None, **environment)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def on_terminal(arguments: Sequence[str], **environment: str) -> tuple[str, str]:
    """What `map` shows on a terminal of 80 columns: on stdout, and on stderr."""
    ends = [os.openpty(), os.openpty()]
    inherited = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "diffmergefs", "map", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=ends[0][1],
            stderr=ends[1][1],
            env=inherited
            | {"LC_ALL": "C.UTF-8", "TERM": "xterm-256color", "COLUMNS": "80"}
            | environment,
            timeout=60,
            check=False,
        )
        texts = []
        for ours, theirs in ends:
            os.close(theirs)
            text = b""
            try:
                while more := os.read(ours, 1 << 16):
                    text += more
            except OSError:
                pass  # the other end is closed, and all is read
            texts.append(text.decode().replace("\r\n", "\n"))
    finally:
        for ours, _ in ends:
            os.close(ours)
    assert done.returncode == 0, texts
    return texts[0], texts[1]


# In the terminal


def test_written_zeros_are_told_by_a_scan(layers: list[Path]) -> None:
    with unchanged(layers):
        text = shown("--zeros", *named(layers))
    assert "2 written zeros   █\n" in text
    assert "2 two" + 43 * " " + "██\n" in text
    assert "0 written zeros" not in text and "1 written zeros" not in text
    rows = [unsized(line).split() for line in text.splitlines()]
    assert ["2", "written", "zeros", str(4 * PAGE), "1.56", "%"] in rows
    assert ["2", str(layers[2]), str(8 * PAGE), "3.12", "%"] in rows


def test_a_scan_that_finds_no_written_zeros_says_so(layers: list[Path]) -> None:
    text = shown("--zeros", *named(layers[:2]))
    assert "written zeros" not in text.replace("There are no written zeros.\n", "")
    assert text.count("There are no written zeros.\n") == 1
    assert "zeros." not in shown(*named(layers[:2]))


def test_in_the_c_locale_it_is_ascii(chain: list[str]) -> None:
    assert shown(*chain, LC_ALL="", LC_CTYPE="", LANG="C").isascii()


def test_a_pipe_gets_no_colours_and_a_terminal_does_unless_told(chain: list[str]) -> None:
    plain = shown(*chain)
    assert "\x1b" not in plain
    coloured, _ = on_terminal(chain)
    assert "\x1b[36m" in coloured or "\x1b[32m" in coloured
    colourless, _ = on_terminal(chain, NO_COLOR="1")
    assert not any(f"\x1b[3{digit}m" in colourless for digit in range(8))
    assert "▁▆" in coloured and "▁▆" in colourless


def test_a_range_is_shown_alone_and_to_the_byte(chain: list[str]) -> None:
    text = shown("--range", "0x1001:32K", *chain)
    assert "0x00001001 to 0x00008000, 1 page a column (4 KiB)\n" in text
    assert "0 base         ████\n" in text
    assert "1 one              ███\n" in text
    rows = [unsized(line).split() for line in text.splitlines()]
    assert ["1", chain[1].partition("=")[2], str(3 * PAGE), "42.86", "%"] in rows
    assert ["0", chain[0].partition("=")[2], str(4 * PAGE - 1), "57.14", "%"] in rows
    assert "0x00000000 to 0x00001000" in shown("--range=:4096", *chain)
    assert "0x000ff000 to 0x00100000" in shown("--range=1020k:", *chain)


def test_an_image_is_named_by_its_tags(tmp_path: Path) -> None:
    store = write_chain(tmp_path / "store", ["python", "numpy"])
    text = shown(store / "numpy")
    assert text.startswith(f"{store}/numpy: 64 KiB, 2 layers\n")
    assert "\n0 python " in text and "\n1 numpy " in text


@pytest.mark.parametrize("form", [[], ["--json"]], ids=str)
def test_a_bar_shows_how_far_it_is_and_is_wiped_away(chain: list[str], form: list[str]) -> None:
    """On stderr, and not a byte of it in what is printed."""
    out, err = on_terminal([*form, *chain], NO_COLOR="1")
    assert ("map" in err) == (not form)  # ranges that scroll by are a bar of their own
    assert out.startswith("[{" if form else "base: 1 MiB")
    with_scan, err = on_terminal(["--zeros", *form, *chain], NO_COLOR="1")
    data = f"{193 * PAGE / 1024:.1f}"
    assert (f"{data}/{data} KiB" in err) == (not form)
    assert with_scan.startswith(out[:20]) and "\x1b[2K" not in with_scan


def test_a_bar_beside_a_pipe_leaves_the_json_alone(chain: list[str]) -> None:
    ours, theirs = os.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "diffmergefs", "map", "--json", "--zeros", *chain],
            stdout=subprocess.PIPE,
            stderr=theirs,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
            timeout=60,
            check=False,
        )
        shown_there = os.read(ours, 1 << 16).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert sum(entry["length"] for entry in json.loads(done.stdout)) == SIZE
    assert "zeros" in shown_there and "start" not in shown_there


# As JSON


def ranges(*arguments: str | Path) -> list[dict[str, Any]]:
    return json.loads(shown("--json", *arguments))  # type: ignore[no-any-return]


def test_json_has_a_line_a_range(layers: list[Path]) -> None:
    text = shown("--json", *named(layers))
    found = json.loads(text)
    assert len(text.splitlines()) == len(found)
    assert found[0] == {
        "start": 0,
        "length": PAGE,
        "depth": 1,
        "present": True,
        "zero": False,
        "data": True,
        "offset": 0,
        "layer": str(layers[1]),
    }
    hole = next(entry for entry in found if not entry["present"])
    assert hole == {
        "start": 192 * PAGE,
        "length": 63 * PAGE,
        "depth": 2,
        "present": False,
        "zero": True,
        "data": False,
    }
    assert sum(entry["length"] for entry in found) == SIZE


def test_json_tells_written_zeros_after_a_scan_only(layers: list[Path]) -> None:
    entry = next(e for e in ranges(*named(layers)) if e["start"] == 8 * PAGE)
    assert (entry["zero"], entry["data"], entry["layer"]) == (False, True, str(layers[2]))
    scanned = next(e for e in ranges("--zeros", *named(layers)) if e["start"] == 8 * PAGE)
    assert scanned == entry | {"zero": True}


def test_json_of_a_range_is_clipped_to_it(chain: list[str]) -> None:
    found = ranges("--range", f"100:{2 * PAGE}", *chain)
    assert [(e["start"], e["length"], e["offset"]) for e in found] == [
        (100, PAGE - 100, 100),
        (PAGE, PAGE, PAGE),
    ]


COMPARED = ("start", "length", "depth", "present", "zero", "data")


def qemu_chain(directory: Path, contents: Sequence[Sequence[tuple[int, int]]], size: int) -> Path:
    """A qcow2 chain whose layers have data in these ranges; its newest file."""
    newest: Path | None = None
    for number, extents in enumerate(contents):
        path = directory / f"{number}.qcow2"
        backing = [] if newest is None else ["-b", str(newest), "-F", "qcow2"]
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096"]
        subprocess.run([*create, *backing, str(path), str(size)], check=True)
        writes = [f"write -q -P {number + 1} {start} {stop - start}" for start, stop in extents]
        commands = [argument for write in writes for argument in ("-c", write)]
        if commands:
            subprocess.run(["qemu-io", *commands, str(path)], check=True, stdout=subprocess.DEVNULL)
        newest = path
    assert newest is not None
    return newest


def qemu_map(newest: Path) -> list[dict[str, Any]]:
    """What qemu-img reports, neighbours joined that it tells apart by their place in the file."""
    command = ["qemu-img", "map", "--output=json", str(newest)]
    output = subprocess.run(command, capture_output=True, check=True).stdout
    joined = []
    for facts, group in groupby(json.loads(output), lambda e: [e[key] for key in COMPARED[2:]]):
        entries = list(group)
        length = sum(entry["length"] for entry in entries)
        joined.append(dict(zip(COMPARED, [entries[0]["start"], length, *facts], strict=True)))
    return joined


@pytest.mark.parametrize("seed", range(4))
def test_json_is_what_qemu_img_says_of_an_equal_chain(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    pages, depth = 600, 1 + seed
    contents = []
    for number in range(depth):
        starts = sorted(chance.sample(range(0, pages, 4), 40 if number else 90))
        extents = [(s * PAGE, (s + chance.randrange(1, 5)) * PAGE) for s in starts]
        contents.append(extents)
    layers = [
        write_layer(
            tmp_path / str(number),
            pages * PAGE,
            [(start, signed(number, start, stop - start)) for start, stop in extents],
        )
        for number, extents in enumerate(contents)
    ]
    found = [{key: entry[key] for key in COMPARED} for entry in ranges(*named(layers))]
    assert found == qemu_map(qemu_chain(tmp_path, contents, pages * PAGE))
    assert len(found) > 50


# As a picture


MORE = ["--zeros", "--layout=hilbert", "--range=4K:"]


@pytest.mark.parametrize(("form", "more"), [("png", []), ("svg", []), ("svg", MORE), ("PNG", MORE)])
def test_a_picture_is_a_file_of_its_kind(
    layers: list[Path], tmp_path: Path, form: str, more: list[str]
) -> None:
    output = tmp_path / f"map.{form}"
    with unchanged(layers):
        done = diffmergefs("map", "-o", output, *more, *named(layers))
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"diffmergefs: {output}: written\n"
    content = output.read_bytes()
    if form == "svg":
        assert content.startswith(b"<?xml") and b"<svg" in content
        assert (b"Hilbert" in content, b"written zeros" in content) == (bool(more), bool(more))
    else:
        assert Image.open(io.BytesIO(content)).format == "PNG"
    assert sorted(os.listdir(tmp_path)) == sorted(["base", "one", "two", output.name])


def test_a_picture_replaces_nothing_unless_forced(chain: list[str], tmp_path: Path) -> None:
    output = tmp_path / "map.svg"
    output.write_text("mine")
    line = mistake(errors.OutputRefusedError.exit_code, "map", "-o", output, *chain)
    assert f"{output}: exists" in line and "--force" in line
    assert output.read_text() == "mine"
    assert diffmergefs("map", "-o", output, "--force", *chain).returncode == 0
    assert output.read_text().startswith("<?xml")


def test_a_layer_is_not_drawn_over_even_if_forced(tmp_path: Path) -> None:
    base = write_layer(tmp_path / "base.png", SIZE, [(0, signed(0, 0, PAGE))])
    with unchanged([base]):
        line = mistake(8, "map", "-o", base, "--force", "--base", base)
    assert "is a layer of the image itself" in line


def test_who_may_not_write_there_gets_one_line(public_path: Path) -> None:
    base = write_layer(public_path / "base", SIZE, [(0, signed(0, 0, PAGE))])
    arguments: list[str | Path] = ["map", "-o", public_path / "map.svg", "--base", base]
    line = one_line(diffmergefs_as_nobody(*arguments), errors.FileAccessError.exit_code)
    assert "Permission denied" in line
    assert os.listdir(public_path) == ["base"]


# A Python in which matplotlib cannot be imported.
_WITHOUT = """
import sys
sys.modules["matplotlib"] = sys.modules["numpy"] = sys.modules["PIL"] = None
from diffmergefs import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def without_matplotlib(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _WITHOUT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False, timeout=60)


def test_without_matplotlib_a_picture_is_one_line_and_all_else_works(
    chain: list[str], tmp_path: Path
) -> None:
    for arguments in (["map", "-o"], ["info", "--plot"]):
        done = without_matplotlib(*arguments, tmp_path / "new.png", *chain)
        line = one_line(done, errors.MissingExtraError.exit_code)
        assert line.endswith(f"; install it: {sys.executable} -m pip install matplotlib\n")
    assert not (tmp_path / "new.png").exists()
    for arguments in (["map"], ["map", "--zeros"], ["map", "--json"], ["info"]):
        done = without_matplotlib(*arguments, *chain)
        assert (done.returncode, done.stderr) == (0, "") and done.stdout


def test_what_lies_in_the_current_directory_is_not_obeyed(chain: list[str], tmp_path: Path) -> None:
    """Matplotlib reads `matplotlibrc` there. A FIFO would be waited for."""
    os.mkfifo(tmp_path / "matplotlibrc")
    done = diffmergefs("map", "-o", "map.svg", *chain, cwd=tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "map.svg").exists()


def test_what_the_user_configured_changes_no_picture(chain: list[str], tmp_path: Path) -> None:
    first, second = tmp_path / "1.svg", tmp_path / "2.svg"
    assert diffmergefs("map", "-o", first, *chain).returncode == 0
    (tmp_path / "matplotlibrc").write_text("svg.fonttype: path\nfont.size: 40\n")
    # Not as root, whose environment is not believed.
    code = "import sys; from diffmergefs import cli; sys.exit(cli.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "map", "-o", str(second), *chain],
        env=os.environ | {"MATPLOTLIBRC": str(tmp_path / "matplotlibrc"), "HOME": "/proc/none"},
        capture_output=True,
        check=False,
        timeout=60,
    )
    # Nor does it say that matplotlib cannot keep its cache of fonts there.
    said = f"diffmergefs: {second}: written\n".encode()
    assert (done.returncode, done.stderr) == (0, said)
    assert first.read_bytes() == second.read_bytes()


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--range", "5"], "'5' is not START:END"),
        (["--range", "a:b"], "'a' is not a size like 4096"),
        (["--range", "0:1.5K"], "'1.5K' is not a size like 4096"),
        (["--range", "0:-1"], "'-1' is not a size like 4096"),
        (["--range", "4K:4K"], "0x1000:0x1000 is not a range within the image's 0x100000 bytes"),
        (["--range", "1M:"], "0x100000:0x100000 is not a range within the image's 0x100000 bytes"),
        (["--range", "0:1048577"], "0x0:0x100001 is not a range within the image's 0x100000 bytes"),
        (["-o", "map.jpg"], "map.jpg: a picture's name must end in .png or .svg"),
        (["-o", "map"], "map: a picture's name must end in .png or .svg"),
        (["-o", "map.png", "--json"], "--json and -o cannot be combined"),
        (["--force"], "name it with -o"),
        (["--layout", "linear"], "name it with -o"),
        (["--layout", "other", "-o", "map.png"], "'other' is not one of"),
        (["image"], "either IMAGE or --base"),
    ],
)
def test_a_mistake_is_said_and_ends_with_2(
    chain: list[str], tmp_path: Path, arguments: list[str], said: str
) -> None:
    done = diffmergefs("map", *arguments, *chain, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in " ".join(done.stderr.split())
    assert sorted(os.listdir(tmp_path)) == ["base", "one", "two"]


def test_a_missing_image_is_one_line(tmp_path: Path) -> None:
    line = mistake(errors.FileAccessError.exit_code, "map", tmp_path / "none")
    assert "No such file" in line
