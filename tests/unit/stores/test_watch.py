"""Which snapshots may be shown, judged look by look with a clock of the test's own."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

from diffmergefs.core.errors import BrokenChainError
from diffmergefs.core.identity import FileVersion
from diffmergefs.stores.catalog import Catalog, StoreOptions, read_catalog
from diffmergefs.stores.snapshot import StoredFile
from diffmergefs.stores.watch import Watch
from tests.support.images import write_layer
from tests.support.stores import (
    BASE_PAGES,
    OLD_NS,
    SECOND_NS,
    SIZE,
    age,
    pages,
    write_chain,
    write_document,
    write_numbered,
    write_tag,
)


class Looks:
    """Looks at one store; what was shown and unsettled, and which files were hashed."""

    def __init__(self, store: Path, *, allow_gaps: bool = False) -> None:
        self.store = store
        self._allow_gaps = allow_gaps
        self.now_ns = OLD_NS + 100 * SECOND_NS
        self.hashed: list[str] = []
        self.unsettled: set[str] = set()
        self.watch = Watch(self._hash)
        self._catalog: Catalog | None = None

    def _hash(self, file: StoredFile) -> str:
        self.hashed.append(file.path)
        return hashlib.sha256((self.store / file.path).read_bytes()).hexdigest()

    def look(self) -> set[str]:
        self._catalog = read_catalog(
            str(self.store), options=StoreOptions(allow_gaps=self._allow_gaps)
        )
        shown, self.unsettled = self.watch.judge(self._catalog, self.now_ns)
        self.now_ns += SECOND_NS // 2
        return set(shown)

    def reason(self, tag: str) -> str:
        assert self._catalog is not None
        with pytest.raises(BrokenChainError) as caught:
            self._catalog.chain(tag)
        return str(caught.value)

    def fresh(self, *paths: Path) -> None:
        """Give the files an mtime of just now."""
        age(*paths, mtime_ns=self.now_ns)


@pytest.fixture
def looks(tmp_path: Path) -> Looks:
    return Looks(write_chain(tmp_path / "store", ["base", "work", "leaf"]))


def replace_memory(folder: Path, layer: int, mtime_ns: int = OLD_NS) -> None:
    """Another file of the same size under the name of a tag's memory."""
    new = write_layer(folder / "new", SIZE, pages(layer, BASE_PAGES))
    age(new, mtime_ns=mtime_ns)
    new.rename(folder / "memory.bin")


def test_old_files_are_shown_at_the_first_look(looks: Looks) -> None:
    assert looks.look() == {"base", "work", "leaf"}
    assert looks.unsettled == set()


def test_a_fresh_tag_must_be_the_same_in_two_looks(looks: Looks) -> None:
    looks.fresh(looks.store / "leaf" / "memory.bin")
    assert looks.look() == {"base", "work"}
    assert looks.unsettled == {"leaf"}
    assert looks.look() == {"base", "work", "leaf"}
    assert looks.unsettled == set()


def test_a_fresh_ancestor_holds_its_descendants_back(looks: Looks) -> None:
    looks.fresh(looks.store / "work" / "vmstate")
    assert looks.look() == {"base"}
    assert looks.unsettled == {"work", "leaf"}


@pytest.mark.parametrize(("age_ns", "shown"), [(2 * SECOND_NS, set()), (2 * SECOND_NS + 1, {"b"})])
def test_two_seconds_are_the_border_of_fresh(tmp_path: Path, age_ns: int, shown: set[str]) -> None:
    looks = Looks(write_chain(tmp_path, ["b"]))
    age(tmp_path / "b" / "memory.bin", mtime_ns=looks.now_ns - age_ns)
    assert looks.look() == shown


def test_a_tag_that_changes_at_every_look_is_never_shown(looks: Looks) -> None:
    for _ in range(4):
        looks.fresh(looks.store / "leaf" / "vmstate")
        assert "leaf" not in looks.look()
    assert "leaf" in looks.look()


def test_a_file_that_is_no_part_of_it_unsettles_no_tag(looks: Looks) -> None:
    looks.fresh(looks.store / "leaf" / "memory.bin")
    looks.look()
    (looks.store / "leaf" / "log").touch()
    assert "leaf" in looks.look()


def test_device_state_counts_as_what_the_look_saw_beside_the_memory(looks: Looks) -> None:
    looks.look()
    vmstate = looks.store / "leaf" / "vmstate"

    def seen() -> object:
        return looks.watch.device_state["leaf/vmstate"]

    assert seen() == FileVersion.of(vmstate.stat())
    vmstate.chmod(0o600)
    assert "leaf" in looks.look() and seen() == FileVersion.of(vmstate.stat())
    # Between a look and the next a VMM may replace either first, or both, new or of old dates.
    for names in (["vmstate"], ["memory.bin"], ["memory.bin", "vmstate"]):
        for mtime_ns in (OLD_NS, looks.now_ns):
            for name in names:
                new = looks.store / "leaf" / "new"
                shutil.copy(looks.store / "leaf" / name, new)
                age(new, mtime_ns=mtime_ns + len(names))
                new.rename(looks.store / "leaf" / name)
            looks.look()
            assert seen() is None
            assert "leaf" in looks.look()
            assert seen() == FileVersion.of(vmstate.stat())


def test_device_state_that_goes_is_not_believed_when_it_comes_back(looks: Looks) -> None:
    looks.look()
    (looks.store / "leaf" / "vmstate").rename(looks.store / "kept")
    looks.look()
    assert looks.watch.device_state["leaf/vmstate"] is None
    (looks.store / "leaf" / "memory.bin").rename(looks.store / "leaf" / "away")
    looks.look()
    looks.look()
    assert "leaf/vmstate" not in looks.watch.device_state


def test_in_numbered_stores_every_file_of_the_number_is_device_state(tmp_path: Path) -> None:
    beside = ["001-a.vmstate", "01-a.disk", "000-base.mem.bmap", "notes"]
    looks = Looks(write_numbered(tmp_path, ["000-base.mem", "001-a.mem"], companions=beside))
    looks.look()
    assert set(looks.watch.device_state) == {"001-a.vmstate", "01-a.disk"}


def test_mtimes_in_the_future_are_fresh_and_settle(looks: Looks) -> None:
    age(looks.store / "leaf" / "memory.bin", mtime_ns=looks.now_ns + 10**6 * SECOND_NS)
    assert looks.look() == {"base", "work"}
    assert looks.look() == {"base", "work", "leaf"}


def test_with_the_same_layers_a_tag_stays_while_companions_change(looks: Looks) -> None:
    looks.look()
    for n in range(3):
        (looks.store / "work" / f"note-{n}").touch()
        looks.fresh(looks.store / "work" / "vmstate", looks.store / "work" / "snapshot.json")
        assert looks.look() == {"base", "work", "leaf"}
        assert looks.unsettled == set()


def test_a_replaced_memory_file_must_settle_too(looks: Looks) -> None:
    looks.look()
    replace_memory(looks.store / "leaf", 7, looks.now_ns)
    assert looks.look() == {"base", "work"}
    assert looks.look() == {"base", "work", "leaf"}


def test_a_replaced_parent_breaks_the_descendants_and_itself_is_shown(looks: Looks) -> None:
    looks.look()
    replace_memory(looks.store / "base", 9)
    for _ in range(3):
        assert looks.look() == {"base"}
        assert looks.reason("work").startswith("parent replaced: base/memory.bin ")
        assert looks.reason("leaf").startswith("ancestor 'work' is broken: parent replaced: ")
    assert looks.hashed == []


def test_a_parent_written_in_place_is_another_parent(looks: Looks) -> None:
    looks.look()
    age(looks.store / "base" / "memory.bin", mtime_ns=OLD_NS + 1)
    assert looks.look() == {"base"}


def test_a_parent_that_is_renamed_or_chmodded_stays_the_same(looks: Looks) -> None:
    looks.look()
    memory = looks.store / "base" / "memory.bin"
    memory.chmod(0o600)
    memory.rename(memory.with_name("other.mem"))
    write_document(looks.store, "base", '{"memory": "other.mem"}')
    assert looks.look() == {"base", "work", "leaf"}


def test_the_old_parent_put_back_brings_the_descendants_back(looks: Looks) -> None:
    looks.look()
    memory = looks.store / "base" / "memory.bin"
    memory.rename(looks.store / "kept")
    write_layer(memory, SIZE, pages(9, BASE_PAGES))
    age(memory)
    assert looks.look() == {"base"}
    (looks.store / "kept").rename(memory)
    assert looks.look() == {"base", "work", "leaf"}


def test_a_parent_that_was_gone_and_comes_back_is_the_same_parent(looks: Looks) -> None:
    looks.look()
    away = looks.store.parent / "away"
    (looks.store / "base").rename(away)
    assert looks.look() == set()
    away.rename(looks.store / "base")
    assert looks.look() == {"base", "work", "leaf"}


def test_a_parent_that_comes_back_as_another_file_is_replaced(looks: Looks) -> None:
    looks.look()
    away = looks.store.parent / "away"
    (looks.store / "base").rename(away)
    looks.look()
    write_tag(looks.store, "base")
    assert looks.look() == {"base"}
    assert "parent replaced" in looks.reason("work")


def test_a_child_replaced_together_with_its_parent_is_shown(looks: Looks) -> None:
    looks.look()
    replace_memory(looks.store / "base", 9)
    replace_memory(looks.store / "work", 8)
    assert looks.look() == {"base", "work"}
    assert "parent replaced: work/memory.bin" in looks.reason("leaf")


def test_a_child_taken_again_after_its_parent_was_replaced_is_shown(looks: Looks) -> None:
    looks.look()
    replace_memory(looks.store / "base", 9)
    looks.look()
    replace_memory(looks.store / "work", 8)
    assert looks.look() == {"base", "work"}


@pytest.mark.parametrize("fits", [True, False])
def test_a_replaced_parent_is_accepted_only_if_the_recorded_hash_fits(
    looks: Looks, fits: bool
) -> None:
    memory = looks.store / "base" / "memory.bin"
    recorded = hashlib.sha256(memory.read_bytes()).hexdigest() if fits else "0" * 64
    document = {"memory": "memory.bin", "parent_tag": "base", "parent_content_hash": recorded}
    write_document(looks.store, "work", json.dumps(document))
    looks.look()
    assert looks.hashed == []
    replace_memory(looks.store / "base", 0)
    assert looks.look() == ({"base", "work", "leaf"} if fits else {"base"})
    assert looks.hashed == ["base/memory.bin"]


def test_a_hash_that_was_accepted_is_not_asked_again(looks: Looks) -> None:
    memory = looks.store / "base" / "memory.bin"
    recorded = hashlib.sha256(memory.read_bytes()).hexdigest()
    document = {"memory": "memory.bin", "parent_tag": "base", "parent_content_hash": recorded}
    write_document(looks.store, "work", json.dumps(document))
    looks.look()
    replace_memory(looks.store / "base", 0)
    for _ in range(3):
        assert "leaf" in looks.look()
    assert looks.hashed == ["base/memory.bin"]


def test_a_parent_that_cannot_be_hashed_does_not_fit(looks: Looks) -> None:
    document = {"memory": "memory.bin", "parent_tag": "base", "parent_content_hash": "0" * 64}
    write_document(looks.store, "work", json.dumps(document))

    def unreadable(file: StoredFile) -> str:
        raise PermissionError(13, "Permission denied")

    watch = Watch(unreadable)
    watch.judge(read_catalog(str(looks.store)), looks.now_ns)
    replace_memory(looks.store / "base", 0)
    shown, _ = watch.judge(read_catalog(str(looks.store)), looks.now_ns)
    assert set(shown) == {"base"}


def test_a_parent_still_being_copied_in_does_not_count_as_replaced(looks: Looks) -> None:
    # `cp -a` of a store whose child's name comes before its parent's.
    memory = looks.store / "base" / "memory.bin"
    looks.fresh(memory)
    assert looks.look() == set()
    looks.fresh(memory)
    assert looks.look() == set()
    age(memory)
    assert looks.look() == {"base", "work", "leaf"}


def test_a_layer_put_between_two_numbered_ones_breaks_the_next(tmp_path: Path) -> None:
    store = write_numbered(tmp_path, ["000-base.mem", "002-b.mem"])
    looks = Looks(store, allow_gaps=True)
    assert looks.look() == {"base", "b"}
    age(write_layer(tmp_path / "001-a.mem", SIZE, pages(5, [5])))
    assert looks.look() == {"base", "a"}
    assert "parent replaced: 001-a.mem" in looks.reason("b")
    os.unlink(tmp_path / "001-a.mem")
    assert looks.look() == {"base", "b"}


def test_numbered_layers_that_are_copied_in_any_order_are_shown_as_they_become_whole(
    tmp_path: Path,
) -> None:
    names = ["000-base.mem", "001-a.mem", "002-b.mem", "003-c.mem"]
    store = write_numbered(tmp_path / "from", names)
    (tmp_path / "to").mkdir()
    looks = Looks(tmp_path / "to")
    shown = [set[str](), {"base"}, {"base"}, {"base", "a", "b", "c"}]
    for name, expected in zip([names[3], names[0], names[2], names[1]], shown, strict=True):
        (store / name).rename(looks.store / name)
        assert looks.look() - {"c"} == expected - {"c"}
    assert looks.look() == {"base", "a", "b", "c"}


def test_a_tag_that_is_gone_is_not_shown(looks: Looks) -> None:
    looks.look()
    (looks.store / "leaf").rename(looks.store.parent / "away")
    assert looks.look() == {"base", "work"}
    assert looks.unsettled == set()


def test_another_parent_tag_in_the_document_is_no_replacement(looks: Looks) -> None:
    write_tag(looks.store, "other", layer=3, numbers=BASE_PAGES)
    looks.look()
    write_document(looks.store, "work", '{"memory": "memory.bin", "parent_tag": "other"}')
    assert looks.look() == {"base", "other", "work", "leaf"}
    replace_memory(looks.store / "other", 9)
    assert looks.look() == {"base", "other"}
    assert looks.reason("work").startswith("parent replaced: other/memory.bin ")


def test_a_numbered_diff_whose_base_is_gone_is_no_base(tmp_path: Path) -> None:
    looks = Looks(write_numbered(tmp_path / "store", ["000-base.mem", "001-a.mem", "002-b.mem"]))
    assert looks.look() == {"base", "a", "b"}
    (looks.store / "000-base.mem").rename(tmp_path / "away")
    for _ in range(2):
        assert looks.look() == set()
        assert looks.reason("a") == (
            "parent missing: 001-a.mem was first seen as a diff of 'base'; put that parent back, or"
            " take the diff again"
        )
        assert looks.reason("b").startswith("ancestor 'a' is broken: parent missing: ")
    (tmp_path / "away").rename(looks.store / "000-base.mem")
    assert looks.look() == {"base", "a", "b"}


def test_while_the_hash_of_a_new_parent_is_not_known_its_children_wait(looks: Looks) -> None:
    new = write_layer(looks.store.parent / "new", SIZE, pages(9, BASE_PAGES))
    known: dict[str, str] = {}
    recorded = hashlib.sha256(new.read_bytes()).hexdigest()
    document = {"memory": "memory.bin", "parent_tag": "base", "parent_content_hash": recorded}
    write_document(looks.store, "work", json.dumps(document))
    watch = Watch(lambda file: known.get(file.path))

    def look() -> tuple[set[str], set[str]]:
        shown, unsettled = watch.judge(read_catalog(str(looks.store)), looks.now_ns)
        return set(shown), unsettled

    assert look() == ({"base", "work", "leaf"}, set())
    replace_memory(looks.store / "base", 9)
    for _ in range(3):
        assert look() == ({"base"}, {"work", "leaf"})
    known["base/memory.bin"] = recorded
    assert look() == ({"base", "work", "leaf"}, set())


def test_only_so_many_tags_that_are_gone_are_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffmergefs.stores.watch._REMEMBERED", 1)
    store = tmp_path / "store"
    write_tag(store, "base")
    for n, tag in enumerate(("a", "b"), 1):
        write_tag(store, tag, "base", layer=n)
    looks = Looks(store)
    assert looks.look() == {"base", "a", "b"}
    for tag in ("a", "b"):
        (store / tag).rename(tmp_path / tag)
    looks.look()
    replace_memory(store / "base", 9)
    for tag in ("a", "b"):
        (tmp_path / tag).rename(store / tag)
    shown = looks.look()
    # Which of the two is forgotten is nobody's business.
    assert len(shown) == 2 and "base" in shown


def handed_over(looks: Looks) -> None:
    """Have another watch go on, as in another process."""
    memory = pickle.loads(pickle.dumps(looks.watch.memory))
    looks.watch = Watch(looks.watch._content_hash)
    looks.watch.memory = memory
    assert looks.watch.memory == memory


def test_a_successor_goes_on_between_the_two_looks_at_a_fresh_tag(looks: Looks) -> None:
    looks.fresh(write_tag(looks.store, "new", "base", layer=3) / "memory.bin")
    assert "new" not in looks.look() and looks.unsettled == {"new"}
    handed_over(looks)
    assert "new" in looks.look()


def test_a_successor_knows_which_parent_each_tag_was_first_seen_with(looks: Looks) -> None:
    looks.look()
    handed_over(looks)
    replace_memory(looks.store / "base", 9)
    assert looks.look() == {"base"}
    handed_over(looks)
    assert looks.look() == {"base"}
    assert "parent replaced" in looks.reason("work")


def test_a_successor_serves_on_what_is_written_to_beside_the_layers(looks: Looks) -> None:
    """The same layers stay served, and the device state must settle."""
    looks.look()
    state = looks.store / "leaf" / "vmstate"
    known = dict(looks.watch.device_state)
    assert known["leaf/vmstate"] == FileVersion.of(state.stat())
    handed_over(looks)
    assert looks.watch.device_state == known
    state.write_bytes(b"another state")
    looks.fresh(state)
    assert "leaf" in looks.look()
    assert looks.watch.device_state["leaf/vmstate"] is None
    handed_over(looks)
    looks.look()
    assert looks.watch.device_state["leaf/vmstate"] == FileVersion.of(state.stat())
