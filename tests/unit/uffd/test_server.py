"""The server as a process: many VMs, its status, and its end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import diffmergefs, mistake, succeed
from tests.support.images import PAGE, overlay_oracle, write_layer
from tests.support.live import until
from tests.support.pageservers import PageServer, serving
from tests.support.stores import BASE_PAGES, age, pages, write_chain, write_tag
from tests.support.stores import SIZE as STORE_SIZE
from tests.support.vmm import Vmm
from tests.unit.uffd.conftest import ORACLE, SIZE

pytestmark = pytest.mark.slow

Layers = tuple[Path, Path]


def options(layers: Layers) -> list[str | Path]:
    return ["--base", layers[0], "--diff", layers[1]]


def status_of(server: PageServer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(succeed("status", "--json", server.socket))
    return found


def until_vms(server: PageServer, count: int) -> None:
    deadline = time.monotonic() + 30
    while len(status_of(server)["vms"]) != count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_several_vms_find_the_image_in_their_memory(layers: Layers, tmp_path: Path) -> None:
    with serving(tmp_path / "socket", *options(layers)) as server, ExitStack() as vms:
        assert stat.S_IMODE(server.socket.stat().st_mode) == 0o600
        made = [vms.enter_context(Vmm(24 * PAGE, 40 * PAGE)) for _ in range(4)]
        for vmm in made:
            vmm.connect(server.socket)
        for vmm in made:
            vmm.send("read", 0, SIZE)
        for vmm in made:
            assert bytes.fromhex(vmm.answer()) == ORACLE
        made[0].give_away(0, SIZE // 4)
        assert made[0].read(0, SIZE) == bytes(SIZE // 4) + ORACLE[SIZE // 4 :]
        assert made[1].read(0, SIZE) == ORACLE


@pytest.mark.parametrize("around", ["4K", "64K", "2M"])
def test_a_guest_that_gives_pages_away_meanwhile_never_finds_old_bytes(
    layers: Layers, tmp_path: Path, around: str
) -> None:
    arguments: list[str | Path] = [*options(layers), "--fault-around", around]
    with serving(tmp_path / "socket", *arguments) as server, Vmm(24 * PAGE, 40 * PAGE) as vmm:
        vmm.connect(server.socket)
        assert vmm.ask("race", 1.0, 0, 24 * PAGE) > 48
        assert vmm.read(0, SIZE) == bytes(24 * PAGE) + ORACLE[24 * PAGE :]


def test_the_status_tells_what_was_done(layers: Layers, tmp_path: Path) -> None:
    with serving(tmp_path / "socket", *options(layers)) as server:
        with Vmm(SIZE) as vmm:
            vmm.connect(server.socket)
            vmm.read(0, 32 * PAGE)
            vmm.give_away(0, PAGE)
            found = status_of(server)
            expected = {"faults": 2, "copied_bytes": 18 * PAGE, "zero_bytes": 14 * PAGE}
            expected |= {"removed_bytes": PAGE, "accepted": 1, "refused": 0, "failed": 0}
            assert {name: found[name] for name in expected} == expected
            assert (found["pid"], found["socket"]) == (server.process.pid, str(server.socket))
            (known,) = found["vms"]
            assert (known["pid"], known["uid"]) == (vmm.process.pid, os.geteuid())
            assert known["problem"] is None
            listed = json.loads(diffmergefs("status", "--json").stdout)
            assert [each for each in listed if each.get("socket") == str(server.socket)] == [
                {
                    "socket": str(server.socket),
                    "image": str(layers[0]),
                    "user": os.geteuid(),
                    "state": "serving",
                    "problem": None,
                    "status": found,
                }
            ]
            assert f"\n{server.socket}  " in diffmergefs("status").stdout
            text = succeed("status", server.socket)
            assert "1 connected, 1 served, 0 refused, 0 failed" in text
            metrics = succeed("status", "--metrics", server.socket).splitlines()
            assert f"diffmergefs_uffd_copied_bytes_total {18.0 * PAGE:.1f}" in metrics
        until_vms(server, 0)
        assert status_of(server)["faults"] == 2


def test_a_stop_takes_no_new_vms_and_serves_the_others_to_their_end(
    layers: Layers, tmp_path: Path
) -> None:
    with serving(tmp_path / "socket", *options(layers)) as server, Vmm(SIZE) as vmm:
        vmm.connect(server.socket)
        vmm.read(0, PAGE)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("takes no new VMs, 1 VM connected")
        assert not server.socket.exists()
        # Another server can take its place meanwhile, and keeps it.
        with serving(tmp_path / "socket", *options(layers)):
            assert vmm.read(0, SIZE) == ORACLE
            vmm.process.kill()
            assert server.process.wait(30) == 0
            assert server.socket.exists()
        assert not server.socket.exists()


def test_a_second_signal_ends_it_and_vms_that_are_connected_wait(
    layers: Layers, tmp_path: Path
) -> None:
    log = ("1 VM that is not served any more hangs",)
    with serving(tmp_path / "socket", *options(layers), expect_log=log) as server, Vmm(SIZE) as vmm:
        vmm.connect(server.socket)
        assert vmm.read(0, PAGE) == ORACLE[:PAGE]
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("takes no new VMs")
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 0
        vmm.send("read", 63 * PAGE, PAGE)
        assert vmm.is_stuck()


def test_a_vm_that_is_killed_disturbs_nobody(layers: Layers, tmp_path: Path) -> None:
    with serving(tmp_path / "socket", *options(layers)) as server, Vmm(SIZE) as other:
        other.connect(server.socket)
        for _ in range(5):
            with Vmm(SIZE) as vmm:
                vmm.connect(server.socket)
                vmm.send("race", 60, 0, SIZE)
                time.sleep(0.05)
        server.wait_for("has ended", 5)
        assert other.read(0, SIZE) == ORACLE


def test_a_connection_that_sends_something_else_is_refused(layers: Layers, tmp_path: Path) -> None:
    with serving(tmp_path / "socket", *options(layers), expect_log=("refused: ",)) as server:
        with Vmm(SIZE) as vmm:
            vmm.connect(server.socket, "GET /")
            assert vmm.is_closed()
        with Vmm(2 * SIZE) as vmm:
            vmm.connect(server.socket)
            assert vmm.is_closed()
        server.wait_for(f"the regions have {2 * SIZE} bytes, and the image has {SIZE}")
        assert status_of(server)["refused"] == 2
        lines = [line for line in server.log().splitlines() if "refused: " in line]
        assert len(lines) == 2


def test_a_layer_that_changes_ends_the_vm_that_needs_it(layers: Layers, tmp_path: Path) -> None:
    log = ("the layer changed", "cannot be served any more, and it was killed")
    with serving(tmp_path / "socket", *options(layers), expect_log=log) as server, Vmm(SIZE) as vmm:
        vmm.connect(server.socket)
        assert vmm.read(30 * PAGE, PAGE) == ORACLE[30 * PAGE :][:PAGE]
        layers[0].write_bytes(b"\xaa" * SIZE)
        vmm.send("read", 0, PAGE)
        assert vmm.process.wait(30) == -signal.SIGKILL
        until_vms(server, 0)
        found = status_of(server)
        assert (found["failed"], found["tainted_layers"]) == (1, 1)


def test_or_leaves_it_waiting_as_asked(layers: Layers, tmp_path: Path) -> None:
    log = ("the layer changed", "cannot be served any more, and it hangs")
    hang: list[str | Path] = [*options(layers), "--on-failure=hang"]
    with serving(tmp_path / "socket", *hang, expect_log=log) as server, Vmm(SIZE) as vmm:
        vmm.connect(server.socket)
        layers[0].write_bytes(b"\xaa" * SIZE)
        vmm.send("read", 0, PAGE)
        server.wait_for("it hangs")
        assert vmm.is_stuck()
        (known,) = status_of(server)["vms"]
        assert "the layer changed" in known["problem"]
        vmm.process.kill()


def test_touches_are_recorded_and_copied_ahead(layers: Layers, tmp_path: Path) -> None:
    sets: list[str | Path] = ["--working-set-dir", tmp_path / "sets"]
    with serving(tmp_path / "socket", *options(layers), "--record", *sets) as server:
        with Vmm(SIZE) as vmm:
            vmm.connect(server.socket)
            for page in (9, 63, 30, 9, 2):
                vmm.read(page * PAGE, PAGE)
        server.wait_for(f"recorded the first touch of {4 * PAGE} bytes in 4 ranges")
    shown = json.loads(succeed("prefetch", *options(layers), "--show", "--json", *sets))
    assert [start // PAGE for start, _ in shown["ranges"]] == [9, 63, 30, 2]
    with serving(tmp_path / "socket", *options(layers), *sets) as server, Vmm(SIZE) as vmm:
        vmm.connect(server.socket)
        deadline = time.monotonic() + 30
        while status_of(server)["prefetched_bytes"] != 4 * PAGE:
            assert time.monotonic() < deadline
        for page in (9, 63, 30, 2):
            assert vmm.read(page * PAGE, PAGE) == ORACLE[page * PAGE :][:PAGE]
        assert status_of(server)["faults"] == 0
        assert vmm.read(0, SIZE) == ORACLE
    without: list[str | Path] = [*options(layers), *sets, "--no-prefetch"]
    with serving(tmp_path / "socket", *without) as server, Vmm(SIZE) as vmm:
        vmm.connect(server.socket)
        assert vmm.read(9 * PAGE, PAGE) == ORACLE[9 * PAGE :][:PAGE]
        assert status_of(server)["prefetched_bytes"] == 0


def test_a_socket_in_use_and_other_files_are_left_alone(layers: Layers, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with serving(path, *options(layers)):
        line = mistake(8, "uffd", *options(layers), "--socket", path)
        assert line.startswith(f"diffmergefs: {path}: a server answers there; ")
    path.write_text("mine")
    assert "is no socket" in mistake(8, "uffd", *options(layers), "--socket", path)
    assert path.read_text() == "mine"


def test_a_socket_whose_server_was_killed_is_replaced(layers: Layers, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "socket"))
    with serving(tmp_path / "socket", *options(layers)) as server, Vmm(SIZE) as vmm:
        vmm.connect(server.socket)
        assert vmm.read(0, PAGE) == ORACLE[:PAGE]


def test_an_image_that_is_refused_gets_no_socket(layers: Layers, tmp_path: Path) -> None:
    with layers[1].open("ab") as file:
        file.write(bytes(PAGE))
    path = tmp_path / "socket"
    mistake(4, "uffd", *options(layers), "--socket", path)
    assert not path.exists()


def test_the_service_manager_is_told(layers: Layers, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        command = ["uffd", *options(layers), "--socket", tmp_path / "socket"]
        process = subprocess.Popen(
            [sys.executable, "-m", "diffmergefs", *map(str, command)],
            env=os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")},
            stderr=subprocess.DEVNULL,
        )
        try:
            assert manager.recv(4096) == b"READY=1\nSTATUS=serving 0 VMs"
            process.send_signal(signal.SIGTERM)
            assert manager.recv(4096) == b"STOPPING=1\nSTATUS=stopping; 0 VMs connected"
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait()


# A directory of sockets


@pytest.fixture
def store(public_path: Path) -> Path:
    return write_chain(public_path / "store", ["base", "leaf"])


@contextmanager
def serving_all(
    store: Path, *options: str | Path, expect_log: tuple[str, ...] = ()
) -> Iterator[PageServer]:
    """A server of all snapshots of the store, at sockets in a directory beside it."""
    place = store.with_name("sockets")
    place.mkdir(exist_ok=True)
    with serving(place, store, *options, at="--socket-dir", expect_log=expect_log) as server:
        yield server
    assert list(place.iterdir()) == []


def image_of(*layers: tuple[int, range | list[int]]) -> bytes:
    return overlay_oracle(STORE_SIZE, [pages(layer, numbers) for layer, numbers in layers])


BASE_IMAGE = image_of((0, BASE_PAGES))
LEAF_IMAGE = image_of((0, BASE_PAGES), (1, [1]))


def test_every_snapshot_of_a_store_has_its_socket(store: Path) -> None:
    with serving_all(store) as server, Vmm(STORE_SIZE) as one, Vmm(STORE_SIZE) as other:
        one.connect(server.socket / "base.sock")
        other.connect(server.socket / "leaf.sock")
        assert one.read(0, STORE_SIZE) == BASE_IMAGE
        assert other.read(0, STORE_SIZE) == LEAF_IMAGE
        found = status_of(server)
        assert (found["socket"], found["image"]) == (str(server.socket), str(store))
        assert found["size"] is None and found["accepted"] == 2
        assert [vm["image"] for vm in found["vms"]] == ["base", "leaf"]
        for path in (server.socket, server.socket / "leaf.sock"):
            text = succeed("status", path)
            assert f"source      {store}\n" in text and "2 connected" in text
            assert "diffmergefs_uffd_vms 2.0" in succeed("status", "--metrics", path)


def test_sockets_come_and_go_with_the_snapshots(store: Path) -> None:
    log = "not shown", "refused: "
    with (
        serving_all(store, expect_log=log) as server,
        Vmm(STORE_SIZE) as vmm,
        Vmm(STORE_SIZE) as late,
    ):
        vmm.connect(server.socket / "leaf.sock")
        assert vmm.read(0, PAGE) == LEAF_IMAGE[:PAGE]
        write_tag(store, "new", "leaf", layer=2, numbers=[2])
        until((server.socket / "new.sock").exists, "there is no socket for the new one")
        late.connect(server.socket / "new.sock")
        assert late.read(0, STORE_SIZE) == image_of((0, BASE_PAGES), (1, [1]), (2, [2]))
        shutil.rmtree(store / "new")
        shutil.rmtree(store / "leaf")
        until(lambda: os.listdir(server.socket) == ["base.sock"], "they are still there")
        # Who has connected is served on, from files that are gone.
        assert vmm.read(0, STORE_SIZE) == LEAF_IMAGE


def test_a_snapshot_that_is_replaced_is_served_anew_to_new_vms(store: Path) -> None:
    with serving_all(store) as server, Vmm(STORE_SIZE) as old:
        old.connect(server.socket / "leaf.sock")
        assert old.read(0, PAGE) == LEAF_IMAGE[:PAGE]
        other = write_layer(store / "leaf" / "new", STORE_SIZE, pages(9, [5]))
        age(other)
        shown = server.log().count("leaf: shown")
        other.rename(store / "leaf" / "memory.bin")
        expected = image_of((0, BASE_PAGES), (9, [5]))

        def is_new() -> bool:
            with Vmm(STORE_SIZE) as vmm:
                vmm.connect(server.socket / "leaf.sock")
                return vmm.read(0, STORE_SIZE) == expected

        until(lambda: server.log().count("leaf: shown") >= shown, "it is not looked at")
        until(is_new, "it is not served anew")
        assert old.read(0, STORE_SIZE) == LEAF_IMAGE


def test_an_image_that_is_refused_closes_the_connection_and_not_the_socket(store: Path) -> None:
    log = "refused: ", "not shown", "memory file is not shown"
    with serving_all(store, expect_log=log) as server:
        with (store / "leaf" / "memory.bin").open("r+b"), Vmm(STORE_SIZE) as vmm:
            vmm.connect(server.socket / "leaf.sock")
            assert vmm.is_closed()
            server.wait_for("open for writing, perhaps by its VMM")

        until(lambda: "is known to be open for writing any more" in server.log(), "it is not tried")
        with Vmm(STORE_SIZE) as again:
            again.connect(server.socket / "leaf.sock")
            assert again.read(0, STORE_SIZE) == LEAF_IMAGE


def test_each_snapshot_has_its_own_working_set(store: Path) -> None:
    sets = "--working-set-dir", store.with_name("sets")
    with serving_all(store, "--record", *sets) as server:
        for name, page in (("base", 3), ("leaf", 1)):
            with Vmm(STORE_SIZE) as vmm:
                vmm.connect(server.socket / f"{name}.sock")
                vmm.read(page * PAGE, PAGE)
        server.wait_for("recorded the first touch of", 2)
    for name, page in (("base", 3), ("leaf", 1)):
        shown = json.loads(succeed("prefetch", store / name, "--show", "--json", *sets))
        assert shown["ranges"] == [[page * PAGE, (page + 1) * PAGE]]
    with serving_all(store, *sets) as server, Vmm(STORE_SIZE) as vmm:
        vmm.connect(server.socket / "leaf.sock")
        until(lambda: status_of(server)["prefetched_bytes"] == PAGE, "nothing is copied ahead")
        assert vmm.read(PAGE, PAGE) == LEAF_IMAGE[PAGE : 2 * PAGE]


def test_a_stop_removes_all_sockets_and_serves_the_vms_to_their_end(store: Path) -> None:
    with serving_all(store) as server, Vmm(STORE_SIZE) as vmm:
        vmm.connect(server.socket / "leaf.sock")
        vmm.read(0, PAGE)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("takes no new VMs, 1 VM connected")
        assert os.listdir(server.socket) == []
        write_tag(store, "new", "leaf", layer=2, numbers=[2])
        # Another server takes the place meanwhile.
        with serving(server.socket, store, at="--socket-dir"):
            assert sorted(os.listdir(server.socket)) == ["base.sock", "leaf.sock", "new.sock"]
            assert vmm.read(0, STORE_SIZE) == LEAF_IMAGE
            vmm.process.kill()
            assert server.process.wait(30) == 0
            assert sorted(os.listdir(server.socket)) == ["base.sock", "leaf.sock", "new.sock"]
