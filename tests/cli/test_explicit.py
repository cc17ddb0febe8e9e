"""Explicit layers: one file twice is refused, an order that looks wrong is asked about."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from diffmergefs.cli.verbs import TABLE, load
from diffmergefs.core.errors import BrokenChainError
from diffmergefs.opening.images import open_chain, open_side
from tests.support.commands import diffmergefs, mistake
from tests.support.images import PAGE, another_name, write_layer
from tests.support.inputs import unchanged
from tests.support.mounts import mounted
from tests.support.pageservers import serving
from tests.support.stores import BASE_PAGES, SIZE, pages

ASKED = "are they in the right order?"

#: How each verb is told of two layers, and what it takes besides.
VERBS = {
    "compare": ("compare", "{0}", "{0}", "--a-diff={1}"),
    "flatten": ("flatten", "--base={0}", "--diff={1}", "-o", "{output}"),
    "info": ("info", "--base={0}", "--diff={1}"),
    "map": ("map", "--base={0}", "--diff={1}"),
    "mount": ("mount", "-f", "--base={0}", "--diff={1}", "{mountpoint}"),
    "rediff": ("rediff", "{0}", "{0}", "--child-diff={1}", "-o", "{output}"),
    "seal": ("seal", "--base={0}", "--diff={1}"),
    "squash": ("squash", "--base={0}", "--diff={1}", "-o", "{output}"),
    "uffd": ("uffd", "--base={0}", "--diff={1}", "--socket={output}"),
    "verify": ("verify", "--base={0}", "--diff={1}"),
}
#: It names a record by the layers' paths, and opens no layer.
WITHOUT_OPENING = {"prefetch"}


def command(verb: str, base: Path, diff: Path, directory: Path) -> list[str]:
    """The command of that verb; what it writes goes to the directory."""
    (directory / "mnt").mkdir(exist_ok=True)
    places = {"output": directory / "output", "mountpoint": directory / "mnt"}
    return [word.format(base, diff, **places) for word in VERBS[verb]]


def written(directory: Path, name: str, numbers: Iterable[int]) -> Path:
    return write_layer(directory / name, SIZE, pages(0, numbers))


def asked(log: pytest.LogCaptureFixture) -> list[str]:
    """The warnings so far that ask about the order."""
    lines = [r.getMessage() for r in log.records if r.levelname == "WARNING"]
    log.clear()
    return [line for line in lines if ASKED in line]


def test_the_table_has_each_verb_that_takes_diffs() -> None:
    taking = {
        name
        for name in TABLE
        if (verb := load(name)) and any((p.name or "").endswith("diffs") for p in verb.params)
    }
    assert taking == VERBS.keys() | WITHOUT_OPENING


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_no_verb_takes_one_file_twice(public_path: Path, verb: str) -> None:
    base = written(public_path, "base", BASE_PAGES)
    os.link(base, public_path / "again")
    words = command(verb, base, public_path / "again", public_path)
    with unchanged([base]):
        if verb == "verify":
            done = diffmergefs(*words)
            assert (done.returncode, done.stderr) == (1, "")
            line = done.stdout
        else:
            line = mistake(3, *words)
    assert f"{public_path}/again: is the same file as the layer {base};" in line
    assert not (public_path / "output").exists()


@pytest.mark.parametrize("how", ["hard link", "symlink", "same path"])
@pytest.mark.parametrize("place", [1, 2])
def test_one_file_in_two_places_of_a_chain(tmp_path: Path, how: str, place: int) -> None:
    base = written(tmp_path, "base", BASE_PAGES)
    diffs = [written(tmp_path, "one", [1]), written(tmp_path, "two", [2])]
    again = another_name(base, how, tmp_path / "again")
    diffs.insert(place, again)
    with pytest.raises(BrokenChainError, match=f"{again}: is the same file as the layer {base};"):
        open_chain(base, diffs)
    with pytest.raises(BrokenChainError, match=f"{diffs[0]}: is the same file as"):
        open_side(base, [diffs[0], diffs[0]])


def test_that_it_is_one_file_comes_before_what_is_wrong_with_it(tmp_path: Path) -> None:
    """A dense base is no dense diff."""
    base = written(tmp_path, "base", range(16))
    with pytest.raises(BrokenChainError, match="same file"):
        open_chain(base, [base])


def test_a_copy_is_another_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [written(tmp_path, name, BASE_PAGES) for name in ("base", "copy")]
    open_chain(paths[0], paths[1:]).view.close()
    assert len(asked(caplog)) == 1


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_each_verb_asks_about_a_wrong_order(public_path: Path, verb: str) -> None:
    base, diff = written(public_path, "base", BASE_PAGES), written(public_path, "diff", [1, 5])
    words = command(verb, diff, base, public_path)
    if verb == "mount":
        with mounted(None, public_path / "mnt", *words[2:-1], expect_log=(ASKED,)) as mount:
            line = next(line for line in mount.log().splitlines() if ASKED in line)
    elif verb == "uffd":
        options = words[1:-1]
        with serving(public_path / "socket", *options, expect_log=(ASKED,)) as server:
            line = next(line for line in server.log().splitlines() if ASKED in line)
    else:
        done = diffmergefs(*words)
        assert done.returncode == (1 if verb == "compare" else 0)
        [line] = done.stderr.splitlines()
    assert f"{diff}: the base has {2 * PAGE} bytes of data, of which 0 show" in line
    assert f"the diff {base} has {15 * PAGE}:" in line


@pytest.mark.parametrize(
    ("base", "diffs", "doubtful"),
    [
        pytest.param(BASE_PAGES, [[1, 2]], False, id="right"),
        pytest.param([1, 2], [BASE_PAGES], True, id="swapped"),
        pytest.param([1, 2], [BASE_PAGES, [3]], True, id="the first diff was the base"),
        pytest.param([1, 2], [[3], BASE_PAGES], True, id="the second diff was the base"),
        pytest.param([1, 2], [[1, 2]], True, id="all of it written again"),
        pytest.param([1, 2, 15], [BASE_PAGES], True, id="a third shows"),
        pytest.param([1, 2, 14, 15], [range(14)], False, id="a half shows"),
        pytest.param([1, 2, 3], [[1, 2, 9]], False, id="a third shows, and no diff has more"),
        pytest.param([1, 2, 3], [[1, 9], [2, 8]], False, id="two diffs have more, none by itself"),
        pytest.param([], [[1, 2]], False, id="a base of holes"),
        pytest.param([1, 2], [[]], False, id="a diff of holes"),
        pytest.param([1, 2], [], False, id="no diff"),
    ],
)
def test_which_order_looks_wrong(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    base: Iterable[int],
    diffs: list[Iterable[int]],
    doubtful: bool,
) -> None:
    paths = [written(tmp_path, f"{n}", numbers) for n, numbers in enumerate([base, *diffs])]
    open_chain(paths[0], paths[1:]).view.close()
    assert len(asked(caplog)) == doubtful
