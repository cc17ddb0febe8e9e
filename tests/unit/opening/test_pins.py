"""Parents' hashes: what is hashed, how often, and what is believed of it later."""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from diffmergefs.core import foreign
from diffmergefs.core.errors import FileAccessError, LayerChangedError, PinError
from diffmergefs.core.identity import FileVersion
from diffmergefs.core.layer import Layer
from diffmergefs.fuse.served import Store
from diffmergefs.opening import pins
from diffmergefs.opening.images import open_chain, open_image
from diffmergefs.opening.pins import Hashes, content_hash, is_pinned, require_pin
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.sidecars.verified import Identity, Remembered
from diffmergefs.stores.snapshot import Snapshot
from tests.support.commands import mistake, succeed
from tests.support.images import PAGE, signed, write_layer
from tests.support.live import until
from tests.support.logged import warnings
from tests.support.stores import OLD_NS, SECOND_NS, age, write_tag

MIB = 1 << 20
ABSENT = "ab" * 32


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def memory(tmp_path: Path) -> Remembered:
    return Remembered(str(tmp_path / "state"))


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files made just now count as made long ago."""
    monkeypatch.setattr(Identity, "is_final", lambda identity, since_ns: True)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the layers that were read for a hash, one for each time."""
    paths: list[str] = []

    def count(layer: Layer, *arguments: Any) -> str:
        paths.append(layer.path)
        return content_hash(layer, *arguments)

    monkeypatch.setattr(pins, "content_hash", count)
    return paths


def one_layer(directory: Path, name: str = "layer") -> Layer:
    return Layer.open(str(write_layer(directory / name, 3 * PAGE, [(PAGE, signed(1, 0, PAGE))])))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(1, 10 * PAGE),
    written=st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 3), st.binary(min_size=1)), max_size=4
    ),
)
def test_any_sparse_file_hashes_as_it_reads(
    tmp_path: Path, size: int, written: list[tuple[int, int, bytes]]
) -> None:
    path = tmp_path / "layer"
    with path.open("wb") as file:
        for page, count, data in written:
            file.seek(page * PAGE)
            file.write((data * PAGE)[: count * PAGE])
        file.truncate(size)
    assume(foreign.of_head(path.read_bytes()) is None)
    assert content_hash(Layer.open(str(path))) == sha256(path)


def test_all_bytes_are_reported_and_holes_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_layer(tmp_path / "layer", 40 * MIB, [(20 * MIB, signed(1, 0, MIB + PAGE))])
    layer = Layer.open(str(path))
    asked: list[tuple[int, int]] = []
    read_into = Layer.read_into

    def watched(self: Layer, buffer: memoryview, offset: int, **options: bool) -> None:
        asked.append((offset, len(buffer)))
        read_into(self, buffer, offset, **options)

    monkeypatch.setattr(Layer, "read_into", watched)
    reported: list[int] = []
    content_hash(layer, reported.append)
    assert sum(reported) == 40 * MIB
    assert max(reported) <= MIB
    assert asked == [(20 * MIB, MIB), (21 * MIB, PAGE)]


def test_what_a_seal_calls_a_hole_is_hashed_too(tmp_path: Path) -> None:
    # The recorded hash is of the bytes as read: no other record of extents may change it.
    layer = one_layer(tmp_path)
    known = content_hash(layer)
    layer.extents = type(layer.extents)([])
    assert content_hash(layer) == known


def test_a_file_that_changes_while_it_is_hashed_has_no_hash(
    tmp_path: Path, memory: Remembered, settled: None, caplog: pytest.LogCaptureFixture
) -> None:
    layer = one_layer(tmp_path)
    hashes = Hashes(memory)
    touched = OLD_NS + 1

    def touch(count: int) -> None:
        os.utime(layer.path, ns=(touched, touched))

    with pytest.raises(LayerChangedError, match="mtime moved"):
        hashes.of(layer, progress=touch)
    with pytest.raises(LayerChangedError):
        hashes.of(layer)
    identity = Identity(os.path.realpath(layer.path), FileVersion.of(os.stat(layer.path)))
    assert memory.recall("sha256", identity) is None


def test_a_chmod_while_it_is_hashed_is_no_change(tmp_path: Path, memory: Remembered) -> None:
    layer = one_layer(tmp_path)
    expected = sha256(Path(layer.path))
    assert Hashes(memory).of(layer, progress=lambda count: os.chmod(layer.path, 0o600)) == expected


def test_a_hash_is_computed_once_and_remembered_for_later_runs(
    tmp_path: Path,
    memory: Remembered,
    settled: None,
    hashed: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = one_layer(tmp_path)
    hashes = Hashes(memory)
    known = hashes.of(layer)
    assert hashes.of(layer) == known
    again = Layer.open(layer.path)
    reported: list[int] = []
    later = Hashes(memory)
    assert later.of(again, known, reported.append) == known
    monkeypatch.setattr(Remembered, "recall", None)  # not even the memory is asked twice
    assert later.of(again, known) == known
    assert hashed == [layer.path]
    assert sum(reported) == layer.size


def test_it_is_remembered_whatever_the_path_is_called(
    tmp_path: Path, memory: Remembered, settled: None, hashed: list[str]
) -> None:
    layer = one_layer(tmp_path)
    known = Hashes(memory).of(layer)
    (tmp_path / "link").symlink_to(tmp_path)
    assert Hashes(memory).of(Layer.open(str(tmp_path / "link" / "layer"))) == known
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        assert Hashes(memory).of(Layer.open("layer", fd)) == known
    finally:
        os.close(fd)
    assert len(hashed) == 1


def test_a_changed_file_is_hashed_again(tmp_path: Path, memory: Remembered, settled: None) -> None:
    old = Hashes(memory).of(one_layer(tmp_path))
    path = write_layer(tmp_path / "layer", 3 * PAGE, [(0, signed(2, 0, PAGE))])
    assert Hashes(memory).of(Layer.open(str(path))) == sha256(path) != old


def test_a_known_hash_is_of_no_use_to_a_layer_that_was_opened_before(
    tmp_path: Path, memory: Remembered, settled: None
) -> None:
    old = one_layer(tmp_path)
    path = write_layer(tmp_path / "layer", 3 * PAGE, [(0, signed(2, 0, PAGE))])
    Hashes(memory).of(Layer.open(str(path)))
    with pytest.raises(LayerChangedError):
        Hashes(memory).of(old)


def test_a_file_changed_just_now_is_hashed_by_the_next_run_again(
    tmp_path: Path, memory: Remembered, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = one_layer(tmp_path)
    changed_ns = os.stat(layer.path).st_ctime_ns
    for _ in range(2):
        # However long the reading takes: it began too early.
        clock = iter([changed_ns + 1_000_000, changed_ns + 10 * SECOND_NS])
        monkeypatch.setattr(
            "diffmergefs.opening.pins.time.time_ns", lambda clock=clock: next(clock)
        )
        Hashes(memory).of(layer)
    assert len(hashed) == 2


def test_anew_believes_nothing_of_earlier_runs_and_reads_once_in_its_own(
    tmp_path: Path, memory: Remembered, settled: None, hashed: list[str]
) -> None:
    layer = one_layer(tmp_path)
    Hashes(memory).of(layer)
    hashes = Hashes(memory, anew=True)
    for _ in range(2):
        hashes.of(layer)
    assert len(hashed) == 2


def test_a_wrong_memory_lets_no_good_file_look_wrong(
    tmp_path: Path, memory: Remembered, settled: None
) -> None:
    layer = one_layer(tmp_path)
    status = os.stat(layer.path)
    memory.remember(
        "sha256", Identity(os.path.realpath(layer.path), FileVersion.of(status)), ABSENT
    )
    known = sha256(Path(layer.path))
    assert Hashes(memory).of(layer, known) == known
    assert Hashes(memory).of(layer) == known  # and is mended by it


def test_many_who_ask_at_once_hash_a_file_once(
    tmp_path: Path, memory: Remembered, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = one_layer(tmp_path)
    hashes = Hashes(memory)
    go_on = threading.Event()
    begun: list[str] = []

    def slow(layer: Layer, *arguments: Any) -> str:
        begun.append(layer.path)
        assert go_on.wait(30)
        return content_hash(layer, *arguments)

    monkeypatch.setattr(pins, "content_hash", slow)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(hashes.of(layer))) for _ in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: begun, "nobody began")
    # Another file is not kept waiting by it.
    other = one_layer(tmp_path, "other")
    monkeypatch.setattr(pins, "content_hash", content_hash)
    assert hashes.of(other) == sha256(tmp_path / "other")
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert found == [sha256(tmp_path / "layer")] * 8
    assert begun == [layer.path]


def test_a_failed_hash_is_tried_again(
    tmp_path: Path, memory: Remembered, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = one_layer(tmp_path)
    hashes = Hashes(memory)

    def fail(*arguments: Any) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(pins, "content_hash", fail)
    with pytest.raises(OSError):
        hashes.of(layer)
    monkeypatch.setattr(pins, "content_hash", content_hash)
    assert hashes.of(layer) == sha256(tmp_path / "layer")


def test_a_pin_holds_or_names_both_hashes_and_the_next_step(
    tmp_path: Path, memory: Remembered
) -> None:
    layer = one_layer(tmp_path)
    found = sha256(tmp_path / "layer")
    require_pin(layer, Snapshot("work", "base", parent_hash=found), Hashes(memory))
    with pytest.raises(PinError) as error:
        require_pin(layer, Snapshot("work", "base", parent_hash=ABSENT), Hashes(memory))
    text = str(error.value)
    assert text.startswith(f"{layer.path}: its sha256 is {found}, but 'work' was taken over")
    assert ABSENT in text and "\n" not in text
    assert text.endswith("put that file back, or take the diff again")
    assert error.value.exit_code == 19


def test_without_a_recorded_hash_nothing_is_read(
    tmp_path: Path, memory: Remembered, hashed: list[str]
) -> None:
    require_pin(one_layer(tmp_path), Snapshot("work", "base"), Hashes(memory))
    assert hashed == []


def test_who_is_pinned() -> None:
    assert is_pinned(Snapshot("base")) is None
    assert is_pinned(Snapshot("work", "base")) is False
    assert is_pinned(Snapshot("work", "base", parent_hash=ABSENT)) is True


# In a store


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """base <- work <- leaf and base <- free; leaf's pin is wrong, work's is right."""
    store = tmp_path / "store"
    base = write_tag(store, "base") / "memory.bin"
    write_tag(store, "work", "base", layer=1, parent_content_hash=sha256(base))
    write_tag(store, "leaf", "work", layer=2, parent_content_hash=ABSENT)
    write_tag(store, "on-leaf", "leaf", layer=3)
    write_tag(store, "free", "base", layer=4)
    return store


def looked(root: Path, verify: str = "pins") -> Store:
    state = str(root.parent / "state")
    policy = TrustPolicy(verify=verify, state_dir=state)
    store = Store(str(root), policy, clock=lambda: OLD_NS + 100 * SECOND_NS)
    store.look()
    return store


def test_a_wrong_pin_refuses_the_tag_and_its_descendants_once(
    root: Path, hashed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    store = looked(root)
    for tag in ("base", "work", "free"):
        assert store.open(tag).view.layers
    for _ in range(2):
        for tag in ("leaf", "on-leaf"):
            with pytest.raises(PinError, match=r"work/memory\.bin: its sha256 is"):
                store.open(tag)
            with pytest.raises(PinError):
                store.opened(tag)
        store.look()
    assert [line.split(":")[0] for line in warnings(caplog)] == ["leaf", "on-leaf"]
    assert all(ABSENT in line for line in warnings(caplog))
    assert sorted(hashed) == ["base/memory.bin", "work/memory.bin"]


def test_looks_and_unpinned_tags_read_no_parent(root: Path, hashed: list[str]) -> None:
    store = looked(root)
    store.look()
    store.open("free")
    assert hashed == []
    assert store.pins("free") == store.pins("base") == store.pins("nobody") == []


def test_pins_names_the_parents_that_were_not_found_right_yet(root: Path) -> None:
    store = looked(root)

    def named() -> list[tuple[str, str]]:
        return [(parent.tag, link.tag) for parent, link in store.pins("on-leaf")]

    assert named() == [("base", "work"), ("work", "leaf")]
    store.open("work")
    assert named() == [("work", "leaf")]
    with pytest.raises(PinError):
        store.open("on-leaf")
    assert named() == [("work", "leaf")]


def test_what_proved_right_is_noted_while_no_look_goes_through_it(root: Path) -> None:
    store = looked(root)

    class Watched(set[Any]):
        def add(self, pin: Any) -> None:
            assert store._lock.locked()
            super().add(pin)

    store._right = Watched()
    store.open("work")
    assert len(store._right) == 1


def test_no_believes_all_and_full_reads_anew(root: Path, settled: None, hashed: list[str]) -> None:
    assert looked(root, "no").open("leaf").view.layers
    assert looked(root, "no").pins("leaf") == []
    assert hashed == []
    looked(root).open("work")
    looked(root).open("work")
    assert hashed == ["base/memory.bin"]
    looked(root, "full").open("work")
    assert hashed == ["base/memory.bin"] * 2


def test_a_corrected_pin_is_taken_up(root: Path) -> None:
    store = looked(root)
    with pytest.raises(PinError):
        store.open("leaf")
    right = sha256(root / "work" / "memory.bin")
    document = root / "leaf" / "snapshot.json"
    document.write_text(document.read_text().replace(ABSENT, right))
    age(document)
    store.look()
    assert store.opened("leaf") is None
    assert store.open("leaf").view.layers


def test_a_pin_that_is_recorded_later_is_checked(root: Path) -> None:
    store = looked(root)
    store.open("free")
    document = root / "free" / "snapshot.json"
    document.write_text(
        document.read_text().replace("{", f'{{"parent_content_hash":"{ABSENT}",', 1)
    )
    age(document)
    store.look()
    with pytest.raises(PinError):
        store.open("free")


def test_a_parent_that_changes_while_it_is_hashed_is_tried_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = looked(root)
    base = root / "base" / "memory.bin"

    def touch_and_hash(layer: Layer, *arguments: Any) -> str:
        age(base, mtime_ns=OLD_NS + 1)
        return content_hash(layer, *arguments)

    monkeypatch.setattr(pins, "content_hash", touch_and_hash)
    with pytest.raises(LayerChangedError):
        store.open("work")
    monkeypatch.setattr(pins, "content_hash", content_hash)

    def is_shown() -> bool:
        store.look()  # it asks for the hash of the replaced parent, and does not wait for it
        return "work" in store.tags()

    until(is_shown, "the tag did not come back")
    assert store.open("work").view.layers


def test_an_unreadable_parent_is_no_lasting_verdict(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = looked(root)

    def fail(*arguments: Any) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(pins, "content_hash", fail)
    for _ in range(2):
        with pytest.raises(Exception, match="Input/output error"):
            store.open("work")
    monkeypatch.setattr(pins, "content_hash", content_hash)
    assert store.open("work").view.layers


# Images


def test_an_image_whose_parent_is_not_the_recorded_one_is_refused(
    root: Path, settled: None, hashed: list[str], tmp_path: Path
) -> None:
    write_tag(root, "leaf", "work", layer=2, parent_content_hash=ABSENT)
    policy = TrustPolicy(state_dir=str(tmp_path / "state"))
    work = root / "work" / "memory.bin"
    for _ in range(2):
        with pytest.raises(PinError) as caught:
            open_image(root / "leaf", policy)
        said = str(caught.value)
        assert said.startswith(f"{work}: its sha256 is {sha256(work)}") and ABSENT in said
    assert len(open_image(root / "work", policy).view.layers) == 2
    assert len(open_image(root / "leaf", replace(policy, verify="no")).view.layers) == 3
    # Who names the files means them.
    open_chain(root / "base" / "memory.bin", [work, root / "leaf" / "memory.bin"], policy)
    base = str(root / "base" / "memory.bin")
    assert hashed == [base, str(work), str(work)]  # a wrong one is not believed to be so
    open_image(root / "work", replace(policy, verify="full"))
    assert hashed.count(base) == 2


def test_a_parent_that_cannot_be_read_is_one_line(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(layer: Layer, *arguments: Any) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(pins, "content_hash", fail)
    with pytest.raises(FileAccessError, match=r"base/memory\.bin: Input/output error$"):
        open_image(root / "leaf", TrustPolicy(state_dir=str(tmp_path / "state")))


def test_flatten_and_info_refuse_it_and_list_does_not_look(root: Path, tmp_path: Path) -> None:
    write_tag(root, "leaf", "work", layer=2, parent_content_hash=ABSENT)
    state, out = f"--state-dir={tmp_path}/state", tmp_path / "out"
    for command in (["flatten", "-o", out], ["info"]):
        line = mistake(PinError.exit_code, *command, state, root / "leaf")
        assert line.startswith(f"diffmergefs: {root}/work/memory.bin: its sha256 is ")
    assert not out.exists()
    assert "broken" not in succeed("list", state, root)
    succeed("flatten", "-o", out, state, root / "work")
