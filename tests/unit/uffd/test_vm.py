"""One VM in the calling thread: refused, unused, failed, and its end."""

from __future__ import annotations

import hashlib
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from diffmergefs.core.extents import Extent
from diffmergefs.core.view import MergedView
from diffmergefs.uffd import vm as vms
from diffmergefs.uffd.vm import Plan, Refused, Unused, Vm
from tests.support.images import PAGE
from tests.support.vmm import Vmm
from tests.unit.uffd.conftest import ORACLE, SIZE


@pytest.fixture
def plan(view: MergedView) -> Plan:
    return Plan(view, PAGE, kills=True, ahead=list)


def connected(vmm: Vmm, path: Path, plan: Plan, *parts: str) -> Vm:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        vmm.connect(path, *parts)
        return Vm(listening.accept()[0], lambda: plan, "image")


def test_a_vm_is_served_until_its_process_ends(tmp_path: Path, plan: Plan) -> None:
    with Vmm(SIZE) as vmm:
        vm = connected(vmm, tmp_path / "socket", plan)
        vmm.send("digest", 0, SIZE)
        vmm.send("leave")
        told: list[bool] = []
        vm.run(lambda: told.append(vm.accepted))
        assert vmm.answer() == hashlib.sha256(ORACLE).hexdigest()
        served = vm.served()
        assert told == [True] and vm.problem is None and served is not None
        assert (served.pid, served.faults) == (vmm.process.pid, 64)


def test_who_may_not_read_a_layer_is_refused(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vms, "unreadable", lambda layers, peer: layers[1].path)
    with Vmm(SIZE) as vmm:
        vm = connected(vmm, tmp_path / "socket", plan)
        with pytest.raises(
            Refused, match=f"process {vmm.process.pid} of user .* may not read .*diff"
        ):
            vm.run(pytest.fail)
        assert vmm.is_closed() and vm.served() is None


def test_a_message_that_does_not_fit_is_refused(tmp_path: Path, plan: Plan) -> None:
    with Vmm(2 * SIZE) as vmm:
        vm = connected(vmm, tmp_path / "socket", plan)
        with pytest.raises(Refused, match="the regions have"):
            vm.run(pytest.fail)
        assert vmm.is_closed()


def test_a_connection_that_says_nothing_is_unused(plan: Plan) -> None:
    one, other = socket.socketpair()
    other.close()
    with pytest.raises(Unused):
        Vm(one, pytest.fail, "image").run(pytest.fail)


@pytest.mark.parametrize("kills", [True, False])
def test_a_read_error_ends_it_or_leaves_it_waiting(
    tmp_path: Path,
    plan: Plan,
    view: MergedView,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kills: bool,
) -> None:
    with Vmm(SIZE) as vmm:
        vm = connected(vmm, tmp_path / "socket", replace(plan, kills=kills))

        def fill(*arguments: object) -> None:
            raise OSError(5, "Input/output error", "/srv/base")

        def wait(pidfd: int) -> None:
            assert kills or vmm.is_stuck()
            vmm.process.kill()

        monkeypatch.setattr(view, "fill", fill)
        monkeypatch.setattr(vms, "_wait", wait)
        vmm.send("read", 0, PAGE)
        vm.run(lambda: None)
        assert vmm.process.wait(30) == -9
        served = vm.served()
        assert served is not None and "Input/output error: '/srv/base'" in str(served.problem)
        assert ("and it was killed" if kills else "and it hangs") in caplog.text


def test_a_descriptor_that_blocks_holds_nobody_up(
    tmp_path: Path, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    with Vmm(SIZE) as vmm:
        vm = connected(vmm, tmp_path / "socket", plan)
        vm.run(lambda: vmm.ask("block"))
        assert vmm.process.wait(30) == -9
        assert "the userfaultfd cannot be polled" in caplog.text


def test_pieces_are_copied_ahead_between_faults(tmp_path: Path, plan: Plan) -> None:
    pieces = [Extent(start * PAGE, (start + 8) * PAGE) for start in range(0, 32, 8)]
    with Vmm(SIZE) as vmm:
        vm = connected(vmm, tmp_path / "socket", replace(plan, ahead=lambda: list(pieces)))
        vmm.send("digest", 0, SIZE)
        vmm.send("leave")
        vm.run(lambda: None)
        assert vmm.answer() == hashlib.sha256(ORACLE).hexdigest()
        assert vm.counters.ahead_bytes + vm.counters.faults * PAGE >= SIZE
        assert vm.counters.ahead_bytes > 0


def test_no_vm_waits_for_a_layer_that_another_one_reads(
    tmp_path: Path, plan: Plan, view: MergedView, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill, hangs, goes_on = view.fill, threading.Event(), threading.Event()

    def slow(buffer: memoryview, offset: int, supplied: dict[int, int]) -> None:
        if offset == 3 * PAGE:
            hangs.set()
            assert goes_on.wait(60)
        fill(buffer, offset, supplied)

    monkeypatch.setattr(view, "fill", slow)
    with Vmm(SIZE) as waiting, Vmm(SIZE) as other:
        waiting_vm = connected(waiting, tmp_path / "one", plan)
        other_vm = connected(other, tmp_path / "other", plan)
        threads = [
            threading.Thread(target=vm.run, args=(lambda: None,)) for vm in (waiting_vm, other_vm)
        ]
        for thread in threads:
            thread.start()
        waiting.send("read", 3 * PAGE, PAGE)
        assert hangs.wait(60)
        assert other.read(0, 3 * PAGE) == ORACLE[: 3 * PAGE]
        assert waiting.is_stuck(0)
        goes_on.set()
        assert bytes.fromhex(waiting.answer()) == ORACLE[3 * PAGE :][:PAGE]
        for vmm in (waiting, other):
            vmm.process.kill()
        for thread in threads:
            thread.join()
