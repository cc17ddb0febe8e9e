"""INIT is handed from server to server. A socket stands in for the kernel."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from diffmergefs.core.errors import MountFailedError
from diffmergefs.fuse.device import Device, open_devices
from diffmergefs.system.board import Board
from tests.support.forks import fork

# linux/fuse.h
INIT_EXT, HAS_RESEND = 1 << 30, 1 << 39
RESEND = struct.pack("<IiQ", 16, 7, 0)
ANSWER, REQUEST = b"answer to INIT", b"a request"


def init(flags: int, *, size: int = 104) -> bytes:
    """The kernel's INIT request with these flags."""
    low, high = flags & 0xFFFFFFFF, flags >> 32
    header = struct.pack("<IIQQIIIHH", size, 26, 2, 0, 0, 0, 0, 0, 0)
    return (header + struct.pack("<IIIII", 7, 41, 1 << 17, low, high) + bytes(44))[:size]


class Kernel:
    """The kernel's end of a device."""

    def __init__(self, patch: pytest.MonkeyPatch, text: bytes = b"") -> None:
        self.end, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.end.settimeout(20)
        self.fd = device.detach()
        self.end.send(text or init(INIT_EXT | HAS_RESEND))
        readlink = os.readlink

        def links(path: str) -> str:
            is_ours = path == f"/proc/self/fd/{self.fd}"
            return "/dev/fuse" if is_ours else readlink(path)

        patch.setattr(os, "readlink", links)

    def said(self) -> list[bytes]:
        """What came from the server so far."""
        found: list[bytes] = []
        self.end.setblocking(False)
        while True:
            try:
                found.append(self.end.recv(1000))
            except BlockingIOError:
                return found


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    found = Kernel(monkeypatch)
    with found.end:
        yield found
    os.close(found.fd)


def introduced(device: Device, board: Board, *, resend: bool) -> None:
    """As libfuse does it: read INIT, and answer."""
    introduction = device.begin(board, resend=resend)
    assert os.read(device.fd, 1000) == init(INIT_EXT | HAS_RESEND)
    os.write(device.fd, ANSWER)
    introduction.finish()


def test_without_a_device_there_is_no_mount(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "readlink", lambda path: "/elsewhere")
    with pytest.raises(MountFailedError, match="no open device"):
        Device()


def test_a_device_that_was_open_before_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch)
    try:
        assert open_devices() == {kernel.fd}
        with pytest.raises(MountFailedError, match="no open device"):
            Device(open_devices())
        assert Device(set()).fd == kernel.fd
    finally:
        os.close(kernel.fd)
        kernel.end.close()


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (init(INIT_EXT | HAS_RESEND), True),
        (init((1 << 40) - 1), True),
        (init(INIT_EXT), False),
        (init(((1 << 40) - 1) ^ HAS_RESEND), False),
        (init(HAS_RESEND), False),
        (init(1 << 25), False),
        (init(1 << 25, size=56), False),
        (init(1 << 25, size=40), False),
    ],
    ids=["6.9", "all", "6.1", "all others", "no second word", "5.4", "short", "header"],
)
def test_a_kernel_says_whether_it_sends_again(
    request_: bytes, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(monkeypatch, request_)
    with kernel.end:
        device = Device()
        assert (device.fd, device.resends) == (kernel.fd, expected)
        os.close(kernel.fd)


def test_the_first_answer_is_the_kernels_and_later_ones_are_thrown_away(kernel: Kernel) -> None:
    device, board = Device(), Board()
    introduced(device, board, resend=False)
    assert kernel.said() == [ANSWER]
    for _ in range(2):
        introduced(device, board, resend=False)
        assert kernel.said() == []


def test_a_server_that_dies_before_it_answered_leaves_that_to_the_next(kernel: Kernel) -> None:
    device, board = Device(), Board()
    child = fork()
    if child == 0:
        device.begin(board, resend=False)
        os._exit(0)
    os.waitpid(child, 0)
    introduced(device, board, resend=True)
    assert kernel.said() == [ANSWER, RESEND]


def test_the_kernel_is_asked_for_the_requests_of_the_server_before(kernel: Kernel) -> None:
    device, board = Device(), Board()
    introduced(device, board, resend=False)
    kernel.said()
    introduced(device, board, resend=True)
    assert kernel.said() == [RESEND]


def test_the_device_stands_aside_and_comes_back(kernel: Kernel) -> None:
    before = set(os.listdir("/proc/self/fd"))
    device, board = Device(), Board()
    introduction = device.begin(board, resend=False)
    kernel.end.send(REQUEST)
    assert os.read(device.fd, 1000) == init(INIT_EXT | HAS_RESEND)
    os.write(device.fd, ANSWER)
    assert kernel.said() == []
    introduction.finish()
    assert os.read(device.fd, 1000) == REQUEST
    os.write(device.fd, b"reply")
    assert kernel.said() == [ANSWER, b"reply"]
    assert not os.get_inheritable(device.fd)
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_connection_that_has_ended_is_left_to_the_next_read(kernel: Kernel) -> None:
    device, board = Device(), Board()
    introduction = device.begin(board, resend=True)
    os.read(device.fd, 1000)
    os.write(device.fd, ANSWER)
    kernel.end.close()
    introduction.finish()
    assert os.read(device.fd, 1000) == b""
    with pytest.raises(BrokenPipeError) as caught:
        os.write(device.fd, b"reply")
    assert caught.value.errno == errno.EPIPE
