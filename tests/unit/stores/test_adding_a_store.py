"""The reader that docs/adding-a-store.md shows: taken from the page, and used."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs import flatten, open_image
from diffmergefs.core.errors import DiffMergeError
from diffmergefs.fuse.nodes import Root
from diffmergefs.fuse.served import Store
from diffmergefs.fuse.tree import Tree
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.stores import catalog
from diffmergefs.stores.catalog import read_catalog
from diffmergefs.stores.reader import Reader
from diffmergefs.stores.remarks import remarks
from tests.support.images import overlay_oracle, write_layer
from tests.support.places import DOCS
from tests.support.stores import BASE_PAGES, SIZE, age, children, pages

PAGE = DOCS / "adding-a-store.md"
LAYERS = [pages(0, BASE_PAGES), pages(1, [3]), pages(2, [3, 15])]


def example() -> str:
    (found,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return str(found)


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base <- work <- leaf in the layout of the example, whose reader is one of diffmergefs's."""
    names: dict[str, object] = {"__name__": "fleet"}
    exec(compile(example(), str(PAGE), "exec"), names)
    reader = names["FleetReader"]
    assert isinstance(reader, type)
    made: Reader = reader()
    monkeypatch.setitem(catalog.READERS, made.name, made)
    store = tmp_path / "fleet"
    for n, (tag, parent) in enumerate([("base", None), ("work", "base"), ("leaf", "work")]):
        (store / tag).mkdir(parents=True)
        write_layer(store / tag / "ram", SIZE, LAYERS[n])
        (store / tag / "disk").write_text(tag)
        (store / tag / "cpu").write_text(tag)
        (store / tag / "over").write_text(f"{parent or '-'}\n")
        age(*(store / tag).iterdir())
    return store


def test_it_has_less_than_100_lines() -> None:
    assert 10 < len(example().splitlines()) < 100


def test_a_directory_without_snapshots_names_its_marks(fleet: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (line,) = remarks(read_catalog(str(tmp_path / "empty")))
    assert line.endswith(", fleet (TAG/ram)")


def test_it_is_found_without_being_named_and_its_chains_merge(fleet: Path, tmp_path: Path) -> None:
    found = read_catalog(str(fleet))
    assert found.layout == "fleet"
    assert [link.tag for link in found.chain("leaf")] == ["base", "work", "leaf"]
    for n, tag in enumerate(["base", "work", "leaf"], 1):
        with open_image(fleet / tag).view as view:
            assert view.read(0, SIZE) == overlay_oracle(SIZE, LAYERS[:n])
            flatten(view, tmp_path / tag)
        assert (tmp_path / tag).read_bytes() == overlay_oracle(SIZE, LAYERS[:n])


def test_its_tags_stand_in_the_tree_without_what_is_false_there(fleet: Path) -> None:
    store = Store(str(fleet), TrustPolicy(), layout="fleet", clock=lambda: 1 << 62)
    try:
        store.look()
        store.open("leaf")
        tree = Tree("/view", store)
        assert sorted(children(tree, tree.child(Root(), "leaf"))) == ["cpu", "disk", "ram"]
        (fleet / "work" / "over").write_text("nobody")
        store.look()
        assert sorted(store.tags()) == ["base"]
    finally:
        store.close()


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda s: (s / "work/over").write_bytes(b""), "work/over: '' names no directory"),
        (lambda s: (s / "work/over").write_bytes(b"../x"), "names no directory"),
        (lambda s: (s / "work/over").write_bytes(b"\xff"), "is not UTF-8"),
        (lambda s: (s / "work/over").write_bytes(b"x" * 300), "over 255 bytes, too large"),
        (lambda s: (s / "work/over").write_bytes(b"gone"), "parent 'gone' of 'work' is missing"),
        (lambda s: (s / "work/over").write_bytes(b"work"), "cycle: work -> work"),
        (lambda s: (s / "work/over").unlink(), "work/over is missing; write - to it"),
        (lambda s: os.truncate(s / "work/ram", SIZE + 4096), str(SIZE + 4096)),
        (lambda s: (s / "work/ram").unlink() or (s / "work/ram").mkdir(), "not a regular file"),
    ],
)
def test_what_does_not_fit_is_a_problem_of_that_snapshot(
    fleet: Path, harm: Callable[[Path], object], expected: str
) -> None:
    harm(fleet)
    found = read_catalog(str(fleet))
    for tag in ("work", "leaf"):
        with pytest.raises(DiffMergeError, match=re.escape(expected)):
            open_image(fleet / tag)
    assert len(found.chain("base")) == 1


def test_the_page_lists_every_layout() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"| `{layout}` |" in text for layout in catalog.LAYOUTS)
