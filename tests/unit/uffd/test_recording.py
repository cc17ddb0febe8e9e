"""The record of what VMs touch, and the pieces that are copied ahead."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from diffmergefs.core.extents import Extent
from diffmergefs.core.view import MergedView
from diffmergefs.prefetch.record import WorkingSets, identity_of_view
from diffmergefs.uffd.recording import Ahead, Recording
from tests.support.images import PAGE


def page(number: int, count: int = 1) -> Extent:
    return Extent(number * PAGE, (number + count) * PAGE)


@pytest.fixture
def sets(tmp_path: Path) -> WorkingSets:
    return WorkingSets(str(tmp_path / "sets"))


def test_vms_that_are_connected_at_once_share_a_record(sets: WorkingSets, view: MergedView) -> None:
    recording = Recording(sets, view)
    one, other = recording.begin(), recording.begin()
    one.add(3 * PAGE, PAGE)
    other.add(5 * PAGE, PAGE)
    other.add(3 * PAGE, PAGE)
    recording.end()
    assert not sets.has_any()
    recording.end()
    record = sets.load(identity_of_view(view))
    assert record is not None and record.ranges == (page(3), page(5))
    assert Ahead(sets, view)() == [page(3), page(5)]


def test_nothing_touched_makes_no_record(sets: WorkingSets, view: MergedView) -> None:
    recording = Recording(sets, view)
    recording.begin()
    recording.end()
    assert not sets.has_any() and Ahead(sets, view)() == []


def test_a_layer_that_changed_makes_no_record(sets: WorkingSets, view: MergedView) -> None:
    recording = Recording(sets, view)
    recording.begin().add(0, PAGE)
    view.layers[0].tainted = "its size moved"
    recording.end()
    assert not sets.has_any()


def test_a_record_that_cannot_be_written_is_logged(
    view: MergedView, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "sets").write_text("no directory")
    recording = Recording(WorkingSets(str(tmp_path / "sets")), view)
    recording.begin().add(0, PAGE)
    recording.end()
    assert "cannot write the record of a working set" in caplog.text


def test_a_stale_or_broken_record_is_not_used(
    sets: WorkingSets, view: MergedView, layers: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    recording = Recording(sets, view)
    recording.begin().add(0, PAGE)
    recording.end()
    path = Path(sets.path(identity_of_view(view)))
    text = path.read_text()
    path.write_text(text.replace('"mtime_ns":', '"mtime_ns":1'))
    assert Ahead(sets, view)() == [] and "the record is stale" in caplog.text
    path.write_text("{}")
    assert Ahead(sets, view)() == [] and "not a record of a working set" in caplog.text


def test_a_record_that_was_written_since_is_read_again(sets: WorkingSets, view: MergedView) -> None:
    ahead = Ahead(sets, view)
    assert ahead() == []
    for number in (3, 5):
        recording = Recording(sets, view)
        recording.begin().add(number * PAGE, PAGE)
        recording.end()
        assert ahead() == [page(number)]
    known = ahead()
    assert ahead() is known
    assert sets.forget(identity_of_view(view))
    assert ahead() == []
