"""`rediff`, `squash` and `compare` from the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A base, and what it is with the two diffs."""
    parent = write_layer(tmp_path / "parent", SIZE, EXTENTS[0])
    child = write_layer(tmp_path / "child", SIZE, [(0, bytes(MERGED))])
    return parent, child


def layers(store: Path) -> list[Path]:
    return [store / tag / "memory.bin" for tag in ("base", "work", "leaf")]


# rediff


def test_rediff_of_two_files_tells_bytes_and_ratio(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with unchanged(files):
        text = unsized(succeed("rediff", *files, "-o", output, "--verify", "--seal", "--jobs=2"))
    assert text == (
        f"{output}: 2 of 16 pages changed; {2 * PAGE} bytes written of {SIZE}, 12.50%;"
        f" {SIZE} compared, verified, sealed\n"
    )
    assert os.path.exists(f"{output}.bmap")
    succeed("apply", output, files[0])
    assert files[0].read_bytes() == MERGED


def test_rediff_as_json(store: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    found = json.loads(succeed("rediff", store / "base", store / "leaf", "-o", output, "--json"))
    assert found == {
        "output": str(output),
        "size": SIZE,
        "page_size": PAGE,
        "changed_pages": 2,
        "data_bytes": 2 * PAGE,
        "extents": 1,
        "copied": 2 * PAGE,
        "shared": 0,
        "compared_bytes": 2 * PAGE,
        "ratio": 0.125,
        "dense": False,
        "overridden": [],
    }


def test_explicit_layers_name_a_side(store: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    base, work, leaf = layers(store)
    one, two = tmp_path / "one", tmp_path / "two"
    succeed("rediff", base, base, "--child-diff", work, "--child-diff", leaf, "-o", one)
    assert "1 of 16 pages" in succeed("rediff", base, files[1], "--parent-diff", work, "-o", two)
    assert succeed("compare", base, files[1], "--a-diff", one).startswith("equal")
    assert succeed(
        "compare", base, base, "--a-diff", one, "--b-diff", work, "--b-diff", two
    ).startswith("equal")


def test_a_diff_without_a_hole_is_told(tmp_path: Path) -> None:
    parent = write_layer(tmp_path / "parent", SIZE, [])
    child = write_layer(tmp_path / "child", SIZE, [(0, signed(1, 0, SIZE))])
    done = diffmergefs("rediff", parent, child, "-o", tmp_path / "out")
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1 and "--dense" in done.stderr
    assert "16 of 16 pages changed" in done.stdout


def test_rediff_refuses_in_one_line(store: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    longer = write_layer(tmp_path / "longer", SIZE + PAGE, [])
    line = mistake(4, "rediff", files[0], longer, "-o", output)
    assert str(SIZE) in line and str(SIZE + PAGE) in line
    mistake(8, "rediff", *files, "-o", files[0], "--force")
    mistake(8, "rediff", store / "base", store / "leaf", "-o", layers(store)[1], "--force")
    mistake(14, "rediff", tmp_path / "missing", files[0], "-o", output)
    mistake(3, "rediff", store, files[0], "-o", output)
    with files[1].open("r+b"):
        assert "--allow-writers" in mistake(18, "rediff", *files, "-o", output)
    assert not output.exists()
    output.touch()
    assert "--force" in mistake(8, "rediff", *files, "-o", output)
    succeed("rediff", *files, "-o", output, "--force")


def test_rediff_where_nobody_may_write_is_one_line(store: Path, public_path: Path) -> None:
    done = diffmergefs_as_nobody(
        "rediff", store / "base", store / "leaf", "-o", public_path / "out"
    )
    assert one_line(done, 14) == f"diffmergefs: {public_path / 'out'}: {DENIED}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("jobs", [1, 2])
def test_rediff_that_is_stopped_leaves_nothing(
    tmp_path: Path, number: signal.Signals, jobs: int
) -> None:
    # Held at its first read in the second window, so that the signal surely comes in the middle.
    size = 48 << 20
    sides = [write_layer(tmp_path / n, size, pages(k, [1, 5000])) for k, n in enumerate("ab")]
    (tmp_path / "hold").mkdir()
    code = (
        "import os, sys, time\n"
        "from diffmergefs import cli\nfrom diffmergefs.core import sparse\n"
        "real = sparse.read_into\n"
        "def hold(fd, buffer, offset, flags=0):\n"
        "    if offset > 16 << 20:\n"
        "        os.write(1, b'reading\\n')\n"
        "        time.sleep(60)\n"
        "    return real(fd, buffer, offset, flags)\n"
        "sparse.read_into = hold\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    command = ["rediff", *map(str, sides), "-o", str(tmp_path / "hold" / "out"), f"--jobs={jobs}"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        # As from a terminal: to the whole group.
        os.killpg(process.pid, number)
        _, complaint = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "Traceback" not in complaint
    assert os.listdir(tmp_path / "hold") == []


# rediff --store


def test_rediff_of_a_store_shows_the_saving(store: Path, public_path: Path) -> None:
    path = write_layer(store / "leaf" / "memory.bin", SIZE, [(0, bytes(MERGED))])
    age(path)
    new = public_path / "new"
    with unchanged(layers(store)):
        text = unsized(succeed("rediff", "--store", store, "-o", new, "--verify"))
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["TAG", "PARENT", "DONE", "SIZE", "DATA", "BEFORE", "DATA", "NOW"]
    assert lines[1] == ["base", "-", "base", *map(str, (SIZE, 15 * PAGE, 15 * PAGE))]
    assert lines[2] == ["work", "base", "diff", *map(str, (SIZE, PAGE, PAGE))]
    assert lines[3] == ["leaf", "work", "rediffed", *map(str, (SIZE, SIZE, PAGE))]
    assert text.splitlines()[4] == (
        f"{new}: 3 snapshots, 1 dense link rediffed; {32 * PAGE} bytes of data before,"
        f" {17 * PAGE} now, {15 * PAGE} saved, 46.88%"
    )
    for tag in ("base", "work", "leaf"):
        assert succeed("compare", store / tag, new / tag).startswith("equal")
    assert "pins verified: 2" in succeed("verify", new / "leaf")


def test_rediff_of_a_store_as_json_tells_what_is_left_out(store: Path, public_path: Path) -> None:
    (store / "work" / "memory.bin").unlink()
    assert "--skip-broken" in mistake(3, "rediff", "--store", store, "-o", public_path / "new")
    done = diffmergefs(
        "rediff", "--store", store, "-o", public_path / "new", "--skip-broken", "--json"
    )
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert found["output"] == str(public_path / "new")
    assert [s["tag"] for s in found["snapshots"]] == ["base"]
    assert set(found["left_out"]) == {"work", "leaf"}
    assert found["data_before"] == found["data_bytes"] == 15 * PAGE
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("diffmergefs: left out '") for line in lines)


def test_rediff_of_a_store_refuses_in_one_line(store: Path, public_path: Path) -> None:
    mistake(8, "rediff", "--store", store, "-o", store)
    mistake(8, "rediff", "--store", store, "-o", store / "new")
    mistake(14, "rediff", "--store", public_path / "missing", "-o", public_path / "new")
    write_numbered(public_path / "layers", ["000-base.mem"])
    mistake(3, "rediff", "--store", public_path / "layers", "-o", public_path / "new")


# squash


def test_squash_tells_the_bytes(store: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with unchanged(layers(store)):
        text = unsized(succeed("squash", store / "leaf", "-o", output, "--verify", "--seal"))
    assert text == (
        f"{output}: 2 diffs as one; {2 * PAGE} bytes of data in 1 extent, {2 * PAGE} copied,"
        " 0 shared, 0 shadowed, verified, sealed\n"
    )
    base = layers(store)[0]
    assert succeed("compare", store / "leaf", base, "--b-diff", output).startswith("equal")


def test_squash_from_one_tag_to_another_as_json(tmp_path: Path) -> None:
    names = ["000-base.mem", "001-a.mem", "002-b.mem", "003-c.mem"]
    source = write_numbered(tmp_path / "s", names)
    head = source / names[-1]
    for options, expected in [
        (["--from", "b"], names[2:]),
        (["--to", "b"], names[1:3]),
        (["--from", "b", "--to", "b"], names[2:3]),
        ([], names[1:]),
    ]:
        found = json.loads(
            succeed("squash", head, *options, "-o", tmp_path / "out", "--json", "--force")
        )
        assert found["layers"] == [str(source / name) for name in expected]
        assert found["data_bytes"] == len(expected) * PAGE
        assert (found["shadowed_bytes"], found["dense"]) == (0, False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--from", "nobody"], "--from nobody is not a tag of the chain base, work, leaf"),
        (["--to", "nobody"], "--to nobody is not a tag of the chain base, work, leaf"),
        (["--from", "base"], "--from base is the base of the chain base, work, leaf"),
        (["--to", "base"], "--to base is the base"),
        (["--from", "leaf", "--to", "work"], "--from leaf is newer than --to work"),
    ],
)
def test_tags_that_make_no_sense_are_usage(
    store: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    done = diffmergefs("squash", store / "leaf", *options, "-o", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_squash_of_a_base_or_with_tags_of_explicit_layers_is_usage(
    store: Path, tmp_path: Path
) -> None:
    base, work, _ = layers(store)
    done = diffmergefs("squash", store / "base", "-o", tmp_path / "out")
    assert done.returncode == 2 and "it has no diff to squash" in done.stderr
    done = diffmergefs(
        "squash", "--base", base, "--diff", work, "--from", "work", "-o", tmp_path / "out"
    )
    assert done.returncode == 2 and "name only the diffs to squash" in done.stderr
    assert not (tmp_path / "out").exists()
    mistake(8, "squash", store / "leaf", "-o", base, "--force")


# compare


def test_compare_says_equal_with_0_and_different_with_1(
    store: Path, files: tuple[Path, Path]
) -> None:
    with unchanged([*layers(store), *files]):
        text = succeed("compare", store / "leaf", files[1])
        assert text == f"equal: {SIZE} bytes (64 KiB), {SIZE} (64 KiB) compared\n"
        done = diffmergefs("compare", store / "base", files[1], "--map", "--jobs=2")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines()[0] == (
        f"different: the first difference is at byte {PAGE + 2} (0x1002); 2 of 16 pages of 4096"
        " bytes differ"
    )
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert rows == [["START", "STOP", "PAGES"], [str(PAGE), str(3 * PAGE), "2"]]


def test_compare_as_json(store: Path) -> None:
    done = diffmergefs("compare", store / "base", store / "leaf", "--json", "--map")
    assert done.returncode == 1
    facts = {
        "equal": False,
        "size": SIZE,
        "page_size": PAGE,
        "first_difference": PAGE + 2,
        "pages": 16,
        "differing_pages": 2,
        "compared_bytes": 2 * PAGE,
        "ranges": [{"start": PAGE, "stop": 3 * PAGE}],
    }
    assert json.loads(done.stdout) == facts
    found = json.loads(succeed("compare", store / "leaf", store / "leaf", "--json"))
    assert found["equal"] is True and found["first_difference"] is None
    assert "ranges" not in found and found["compared_bytes"] == 0


@pytest.mark.parametrize(("page", "count"), [(512, 16), (4096, 2), (16384, 1)])
def test_the_page_is_the_unit_of_the_answer(
    files: tuple[Path, Path], page: int, count: int
) -> None:
    done = diffmergefs("compare", *files, f"--page-size={page}", "--json")
    assert json.loads(done.stdout)["differing_pages"] == count


def test_compare_takes_numbered_files_as_plain_if_told(tmp_path: Path) -> None:
    source = write_numbered(tmp_path / "s", ["000-base.mem", "001-work.mem"])
    other = tmp_path / "other"
    write_layer(other, SIZE, pages(1, [1]))
    assert diffmergefs("compare", source / "001-work.mem", other).returncode == 1
    assert diffmergefs("compare", source / "001-work.mem", other, "--plain").returncode == 0


def test_compare_refuses_in_one_line(files: tuple[Path, Path], tmp_path: Path) -> None:
    longer = write_layer(tmp_path / "longer", SIZE + PAGE, [])
    line = mistake(4, "compare", files[0], longer)
    assert str(SIZE) in line and str(SIZE + PAGE) in line
    mistake(14, "compare", files[0], tmp_path / "missing")


@pytest.mark.parametrize(
    "arguments",
    [
        ["rediff", "-o", "out"],
        ["rediff", "a", "-o", "out"],
        ["rediff", "a", "b"],
        ["rediff", "a", "b", "--store", "s", "-o", "out"],
        ["rediff", "--store", "s", "--child-diff", "d", "-o", "out"],
        ["rediff", "--store", "s", "--plain", "-o", "out"],
        ["rediff", "--store", "s", "--force", "-o", "out"],
        ["rediff", "a", "b", "--skip-broken", "-o", "out"],
        ["rediff", "a", "b", "--jobs=0", "-o", "out"],
        ["rediff", "a", "b", "--page-size=100", "-o", "out"],
        ["squash", "-o", "out"],
        ["squash", "image"],
        ["squash", "image", "--base", "b", "-o", "out"],
        ["compare", "a"],
        ["compare", "a", "b", "c"],
        ["compare", "a", "b", "--jobs=x"],
    ],
    ids=" ".join,
)
def test_usage_errors_end_with_2_and_change_nothing(arguments: list[str], tmp_path: Path) -> None:
    assert "; " in one_line(diffmergefs(*arguments, cwd=tmp_path), 2)
    assert os.listdir(tmp_path) == []
