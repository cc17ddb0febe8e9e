"""What a diff's bytes tell of its holes, and how often they are read for it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from diffmergefs.core.errors import DenseDiffError
from diffmergefs.core.extents import ExtentList
from diffmergefs.core.layer import Layer
from diffmergefs.core.view import MergedView
from diffmergefs.opening import content, dense
from diffmergefs.opening.content import Pages, compare_pages
from diffmergefs.opening.images import open_snapshot
from diffmergefs.opening.opener import LayerPool
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.stores.catalog import read_catalog
from tests.support.commands import succeed
from tests.support.images import PAGE, write_layer
from tests.support.stores import pages
from tests.support.subjects.content import dense_store, write_at


def test_pages_are_zero_equal_other_or_new(tmp_path: Path) -> None:
    size = 5 * PAGE + 100
    base = Layer.open(str(write_layer(tmp_path / "base", size, pages(0, range(1, 4)))))
    held = [(0, bytes(size)), *pages(0, [1]), *pages(1, [0, 3]), (5 * PAGE, b"end" * 10)]
    layer = Layer.open(str(write_layer(tmp_path / "diff", size, held)))
    found = compare_pages(MergedView([base]).read, layer, 0, size)
    assert found == Pages(zero=1, equal=1, other=1, new=2)
    assert (found.over, found.written) == (3, 4)
    assert compare_pages(None, layer, 0, size) == Pages(zero=2, equal=0, other=4, new=0)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the layers whose pages were sampled, each time that it happens."""
    found: list[str] = []
    real = dense.sample

    def counted(parents: content.Read, below: ExtentList, layer: Layer) -> Pages:
        found.append(layer.path)
        return real(parents, below, layer)

    monkeypatch.setattr(dense, "sample", counted)
    return found


def opened(store: Path, tags: Iterable[str], policy: TrustPolicy) -> None:
    """Open each tag by itself, as a mount does: only what is remembered links them."""
    catalog = read_catalog(str(store))
    root = os.open(store, os.O_RDONLY | os.O_DIRECTORY)
    try:
        pool = LayerPool(root, policy)
        for tag in tags:
            assert open_snapshot(catalog.chain(tag), pool, policy).dense
    finally:
        os.close(root)


@pytest.mark.parametrize("newest_first", [False, True])
def test_a_store_of_100_dense_links_is_sampled_100_times(
    tmp_path: Path, looks: list[str], newest_first: bool
) -> None:
    tags = dense_store(tmp_path / "store", 100)
    policy = TrustPolicy(state_dir=str(tmp_path / "state"))
    opened(tmp_path / "store", reversed(tags) if newest_first else tags, policy)
    assert len(looks) == len(set(looks)) == 100


def test_what_was_found_is_known_in_later_runs_until_a_layer_is_another(
    tmp_path: Path, looks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffmergefs.sidecars.verified.COARSE_TICK_NS", 0)
    monkeypatch.setattr("diffmergefs.sidecars.verified.TICK_NS", 0)
    tags = dense_store(tmp_path / "store", 3)
    policy = TrustPolicy(state_dir=str(tmp_path / "state"))
    opened(tmp_path / "store", tags, policy)
    opened(tmp_path / "store", tags, policy)
    assert len(looks) == 3
    opened(tmp_path / "store", tags, TrustPolicy(state_dir=policy.state_dir, verify="full"))
    assert len(looks) == 6
    # Those above another layer are looked into again, those below it not.
    write_at(tmp_path / "store" / "t001" / "memory.bin", 3)
    opened(tmp_path / "store", tags, policy)
    assert [path.split("/")[0] for path in looks[6:]] == ["t001", "t002"]


def test_a_refusal_is_found_once_for_all_descendants(tmp_path: Path, looks: list[str]) -> None:
    store = tmp_path / "store"
    tags = dense_store(store, 20)
    write_layer(store / "t000" / "memory.bin", 16 * PAGE, [(0, bytes(16 * PAGE)), *pages(1, [1])])
    found = json.loads(succeed("list", "--json", store))
    assert [row["state"] for row in found] == ["complete", *["broken"] * 20]
    catalog = read_catalog(str(store))
    root = os.open(store, os.O_RDONLY | os.O_DIRECTORY)
    pool = LayerPool(root, TrustPolicy())
    for tag in tags:
        with pytest.raises(DenseDiffError):
            open_snapshot(catalog.chain(tag), pool, TrustPolicy())
    os.close(root)
    assert looks == ["t000/memory.bin"]
