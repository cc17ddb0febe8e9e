"""A forkd store with dense links, and the new one that is made of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffmergefs.writing.newstore import NewSnapshot
from diffmergefs.writing.storediff import StoreRediff
from tests.support.images import PAGE, overlay_oracle, signed, write_layer
from tests.support.inputs import unchanged
from tests.support.stores import BASE_PAGES, SIZE, age, pages, write_chain, write_tag

#: What each tag's image is: layers laid one after another.
IMAGES = {
    "base": [pages(0, BASE_PAGES)],
    "work": [pages(0, BASE_PAGES), pages(1, [1])],
    "leaf": [pages(0, BASE_PAGES), pages(1, [1]), pages(2, [2]), [(5 * PAGE, bytes(PAGE))]],
}
IMAGES["tip"] = [*IMAGES["leaf"], pages(3, [3])]
IMAGES["other"] = [[(0, signed(9, 0, SIZE)), *pages(0, [0, 1])]]


def image(tag: str) -> bytes:
    return overlay_oracle(SIZE, IMAGES[tag])


def dense(store: Path, tag: str) -> None:
    """Merge the tag's image into its own file, as forkd does."""
    path = store / tag / "memory.bin"
    write_layer(path, SIZE, [(0, image(tag))])
    age(path)


@pytest.fixture
def store(public_path: Path) -> Iterator[Path]:
    """base <- work <- leaf (dense) <- tip, and base <- other (dense, nearly all of it another)."""
    store = write_chain(public_path / "store", ["base", "work", "leaf"])
    dense(store, "leaf")
    write_tag(store, "tip", "leaf", layer=3, volumes=["/v"], note={"a": [1]})
    write_tag(store, "other", "base")
    dense(store, "other")
    with unchanged(path for path in store.rglob("*") if path.is_file()):
        yield store


def convert(store: Path, output: Path, **options: Any) -> dict[str, NewSnapshot]:
    names = ("skip_broken", "policy")
    given = {name: options.pop(name) for name in names if name in options}
    with StoreRediff(store, **given) as opened:
        made = opened.write(output, **options)
    assert made.data_before == sum(s.data_before for s in made.snapshots)
    assert made.data_bytes == sum(s.data_bytes for s in made.snapshots)
    return {snapshot.tag: snapshot for snapshot in made.snapshots}


def document(store: Path, tag: str) -> dict[str, Any]:
    return dict(json.loads((store / tag / "snapshot.json").read_text()))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
