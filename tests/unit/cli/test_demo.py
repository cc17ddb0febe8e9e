"""The files that `demo` makes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from diffmergefs import cli, open_chain, open_image
from diffmergefs.cli.demo import CONTENTS, PAGES, TAGS, make_files
from diffmergefs.core.extents import PAGE
from diffmergefs.opening.trust import TrustPolicy


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("made")
    return folder, make_files(folder)


def test_it_makes_what_it_lists(made: tuple[Path, bytes]) -> None:
    assert set(os.listdir(made[0])) == {*CONTENTS, "snapshot_file", "snapshot_diff"}


def test_the_tags_are_complete_and_pinned_and_the_merged_one_is_dense(
    made: tuple[Path, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def listed(name: str, field: str) -> list[object]:
        command = ["list", "--json", "--state-dir", str(tmp_path), str(made[0] / name)]
        assert cli.main(command) == 0
        tags = {tag["tag"]: tag[field] for tag in json.loads(capsys.readouterr().out)}
        return [tags.get(tag) for tag in TAGS]

    assert listed("snapshots", "state") == ["complete"] * 3
    assert listed("snapshots", "pinned") == [None, True, True]
    assert listed("merged", "state") == ["complete", "complete", "dense"]
    assert listed("layers", "state") == [None, "complete", "complete"]


def test_the_image_is_the_same_in_each_form(made: tuple[Path, bytes], tmp_path: Path) -> None:
    folder, whole = made
    policy = TrustPolicy(state_dir=str(tmp_path))
    for name in ("snapshots/pandas", "layers/002-pandas.mem", "merged/pandas"):
        with open_image(folder / name, policy).view as view:
            assert view.read(0, view.size) == whole
    words = [whole[number * PAGE :][:6] for number in (0, 100, 200, 1024)]
    assert words == [b"python", b"numpyn", b"pandas", bytes(6)]


def test_a_numbered_layer_is_sealed(made: tuple[Path, bytes]) -> None:
    with open_image(made[0] / "layers/002-pandas.mem").view as view:
        assert [bool(layer.record(".bmap")) for layer in view.layers] == [False, True, False]


def test_the_files_of_firecracker_are_as_it_writes_them(made: tuple[Path, bytes]) -> None:
    """A full snapshot has no hole; a diff has the pages that were written, zeros too."""
    with open_chain(made[0] / "mem_file", [made[0] / "mem_diff"]).view as view:
        full, diff = ([tuple(extent) for extent in layer.extents] for layer in view.layers)
        assert full == [(0, PAGES * PAGE)]
        assert diff == [(2 * PAGE, 3 * PAGE), (100 * PAGE, 228 * PAGE)]
        assert view.read(2 * PAGE, PAGE) == bytes(PAGE)
