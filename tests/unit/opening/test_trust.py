"""Law 4: where a diff's extents are trusted, on the filesystems that give the reasons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffmergefs.core import sparse
from diffmergefs.core.errors import DenseDiffError, SizeMismatchError, UntrustedExtentsError
from diffmergefs.core.extents import Extent
from diffmergefs.opening import trust
from diffmergefs.opening.images import open_chain
from diffmergefs.opening.trust import TrustPolicy, require_trust
from tests.support.fiemap import without_map
from tests.support.images import PAGE, signed, write_layer
from tests.support.subjects.trust import SIZE, diff, refusal, require_overridable


@pytest.mark.parametrize(
    "extent", [(PAGE + 512, 2 * PAGE), (PAGE, 2 * PAGE - 512), (PAGE, 9 * PAGE + 1)]
)
def test_unaligned_extents_are_refused(
    extent: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "data_extents", lambda *_: iter([Extent(*extent)]))
    without_map(monkeypatch)
    layer = diff(tmp_path, *range(1, 12))
    require_overridable(layer, "alignment")
    assert f"[{extent[0]}, {extent[1]})" in str(refusal(layer))


@pytest.fixture
def all_is_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """A filesystem without lseek, as FUSE's default: each file is one extent."""
    monkeypatch.setattr(sparse, "data_extents", lambda _, size: iter([Extent(0, size)]))


@pytest.mark.usefixtures("all_is_data")
def test_more_data_than_blocks_is_refused_and_nothing_overrides_it(tmp_path: Path) -> None:
    layer = diff(tmp_path, 1)
    for complete in (False, True):
        for policy in (TrustPolicy(), TrustPolicy(trust_grain={"all"}, dense=True)):
            with pytest.raises(UntrustedExtentsError) as caught:
                require_trust(layer, policy, complete=complete)
            assert caught.value.check == "blocks"
            assert f"{SIZE} bytes" in str(caught.value) and f"only {PAGE}" in str(caught.value)
            assert "--trust-grain" not in str(caught.value)


def test_several_failed_checks_are_overridden_with_a_line_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = diff(tmp_path, 1)
    monkeypatch.setattr(trust, "untrusted_filesystem", lambda _: "it is on exoticfs")
    first, second = require_trust(layer, TrustPolicy(page_size=2048, trust_grain={"all"}))
    assert "check of filesystem: " in first.override and "check of grain: " in second.override


def test_vouching_for_one_check_lets_no_other_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = diff(tmp_path, 1)
    monkeypatch.setattr(trust, "untrusted_filesystem", lambda _: "it is on exoticfs")
    assert len(require_trust(layer, TrustPolicy(trust_grain={"filesystem"}))) == 1
    assert refusal(layer, TrustPolicy(trust_grain={"copy-up", "grain"})).check == "filesystem"
    coarse = TrustPolicy(page_size=2048, trust_grain=["filesystem", "unwritten"])
    assert refusal(layer, coarse).check == "grain"


def test_trust_grain_overrides_neither_size_nor_density(tmp_path: Path) -> None:
    policy = TrustPolicy(trust_grain={"all"})
    base = write_layer(tmp_path / "base", 4 * PAGE, [])
    other = write_layer(tmp_path / "other", 5 * PAGE, [])
    full = write_layer(tmp_path / "full", 4 * PAGE, [(0, signed(1, 0, 4 * PAGE))])
    with pytest.raises(SizeMismatchError):
        open_chain(base, [other], policy)
    with pytest.raises(DenseDiffError):
        open_chain(base, [full], policy)


@pytest.mark.usefixtures("all_is_data")
def test_a_base_whose_filesystem_reports_no_holes_reads_right(tmp_path: Path) -> None:
    path = write_layer(tmp_path / "base", SIZE, [(PAGE, signed(0, PAGE, PAGE))])
    assert open_chain(path).view.read(0, 2 * PAGE) == bytes(PAGE) + signed(0, PAGE, PAGE)


def test_all_stands_for_every_check() -> None:
    assert TrustPolicy().trust_grain == frozenset()
    assert TrustPolicy(trust_grain=["all"]).trust_grain == frozenset(trust.CHECKS)
    assert TrustPolicy(trust_grain=["grain"]).trust_grain == {"grain"}


@pytest.mark.parametrize("wrong", ["grain", True, {"grain", "blocks"}, [""]])
def test_names_of_no_check_are_refused(wrong: Any) -> None:
    with pytest.raises(
        ValueError, match=r"trust_grain is|is not a check; the checks are filesystem, "
    ):
        TrustPolicy(trust_grain=wrong)


@pytest.mark.parametrize("wrong", [{"page_size": 0}, {"page_size": 3000}, {"verify": "yes"}])
def test_a_policy_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        TrustPolicy(**wrong)
