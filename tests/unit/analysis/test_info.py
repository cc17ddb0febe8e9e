"""`describe`: the numbers of an image."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmergefs.analysis.info import ChainInfo, LayerInfo, describe
from diffmergefs.opening.images import open_chain
from diffmergefs.opening.trust import TrustPolicy
from tests.support.images import PAGE, signed, write_layer
from tests.support.inputs import unchanged

SIZE = 32 * PAGE


def layer(directory: Path, number: int, *pages: int, size: int = SIZE) -> Path:
    """A layer with data in these pages."""
    extents = [(page * PAGE, signed(number, page * PAGE, PAGE)) for page in pages]
    return write_layer(directory / f"{number:03}.mem", size, extents)


def test_a_chain(tmp_path: Path) -> None:
    base = layer(tmp_path, 0, 0, 1, 2, 3)
    first = layer(tmp_path, 1, 1, 5, 6)
    second = layer(tmp_path, 2, 2, 6)
    grain = os.stat(base).st_blksize
    with unchanged([base, first, second]), open_chain(base, [first, second]).view as view:
        facts = describe(open_chain(base, [first, second]))
        assert view.size == facts.size
    assert facts == ChainInfo(
        size=SIZE,
        layers=(
            LayerInfo(str(base), 4 * PAGE, 1, 2 * PAGE, 2 * PAGE, grain, "base"),
            LayerInfo(str(first), 3 * PAGE, 2, 2 * PAGE, PAGE, grain, "trusted"),
            LayerInfo(str(second), 2 * PAGE, 2, 2 * PAGE, 0, grain, "trusted"),
        ),
        holes=26 * PAGE,
        segments=6,
        dense=False,
    )


def test_the_dictionary_is_json(tmp_path: Path) -> None:
    base, diff = layer(tmp_path, 0, 0, 1), layer(tmp_path, 1, 1)
    facts = describe(open_chain(base, [diff])).as_dict()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["size"] == SIZE
    assert [entry["path"] for entry in facts["layers"]] == [str(base), str(diff)]
    assert set(facts["layers"][1]) == {
        "path",
        "data_bytes",
        "extents",
        "visible_bytes",
        "shadowed_bytes",
        "grain",
        "trust",
    }


def test_a_dense_diff(tmp_path: Path) -> None:
    base, diff = layer(tmp_path, 0, 0), layer(tmp_path, 1, *range(32))
    facts = describe(open_chain(base, [diff], TrustPolicy(dense=True)))
    assert facts.dense
    assert (facts.holes, facts.segments) == (0, 1)
    assert facts.layers[0].shadowed_bytes == PAGE


def test_overridden_checks_stand_with_their_layer(tmp_path: Path) -> None:
    base, good = layer(tmp_path, 0, 0), layer(tmp_path, 1, 2, 3)
    bad, worse = layer(tmp_path, 2, 5), layer(tmp_path, 3, 5)
    policy = TrustPolicy(page_size=2 * PAGE, trust_grain={"all"})
    facts = describe(open_chain(base, [good, bad, worse], policy))
    assert [entry.trust for entry in facts.layers] == [
        "base",
        "trusted",
        "overridden: alignment",
        "overridden: alignment",
    ]


@pytest.mark.parametrize("pages", [[], [0, 31]])
def test_a_base_alone(tmp_path: Path, pages: list[int]) -> None:
    facts = describe(open_chain(layer(tmp_path, 0, *pages)))
    assert facts.segments == facts.layers[0].extents == len(pages)
    assert facts.holes == SIZE - len(pages) * PAGE


@settings(deadline=None, max_examples=30)
@given(chain=st.lists(st.sets(st.integers(0, 30)), min_size=1, max_size=5))
def test_bytes_add_up(tmp_path_factory: pytest.TempPathFactory, chain: list[set[int]]) -> None:
    directory = tmp_path_factory.mktemp("info")
    paths = [layer(directory, n, *sorted(pages)) for n, pages in enumerate(chain)]
    facts = describe(open_chain(paths[0], paths[1:]))
    shown = sum(entry.visible_bytes for entry in facts.layers)
    assert shown + facts.holes == SIZE
    assert shown == len(set().union(*chain)) * PAGE
    for entry, pages in zip(facts.layers, chain, strict=True):
        assert entry.data_bytes == len(pages) * PAGE
        assert entry.data_bytes == entry.visible_bytes + entry.shadowed_bytes
