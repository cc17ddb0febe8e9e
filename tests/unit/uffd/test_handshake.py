"""The first message: in parts, with the descriptor before, in or after it, and what is refused."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffmergefs.uffd.handshake import received
from tests.support.images import PAGE
from tests.support.vmm import Vmm

SIZE = 64 * PAGE


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as found:
        found.bind(str(tmp_path / "socket"))
        found.listen()
        yield found


def receive(
    listening: socket.socket, vmm: Vmm, *parts: str, seconds: float = 30, **how: int
) -> int:
    """How many regions were received from a VMM that sends these parts."""
    vmm.send("connect", listening.getsockname(), list(parts), how.get("fds", 1), how["after"])
    connection, _ = listening.accept()
    with connection:
        regions, source = received(connection, SIZE, seconds)
    source.close()
    return len(regions)


@pytest.mark.parametrize("after", [0, 1, -1])
def test_a_message_may_come_in_parts_and_the_descriptor_with_any(
    listening: socket.socket, after: int
) -> None:
    with Vmm(SIZE) as vmm:
        text = json.dumps(vmm.regions)
        parts = [text[:7], text[7:40], text[40:]]
        before = descriptors()
        assert receive(listening, vmm, *parts, after=after % 3) == 1
        assert descriptors() == before


def test_the_descriptor_may_come_after_the_text(listening: socket.socket) -> None:
    with Vmm(SIZE) as vmm:
        assert receive(listening, vmm, json.dumps(vmm.regions), "\n", after=1) == 1


def test_a_message_may_be_long_and_come_byte_by_byte(listening: socket.socket) -> None:
    with Vmm(*[PAGE] * 64) as vmm:
        text = json.dumps(vmm.regions, indent=1)
        assert len(text) > 8192
        assert receive(listening, vmm, text, after=0) == 64
    with Vmm(SIZE) as vmm:
        text = json.dumps(vmm.regions)
        assert receive(listening, vmm, *text, after=30) == 1


@pytest.mark.parametrize(
    ("parts", "fds", "reason"),
    [
        (["GET / HTTP/1.1\n"], 1, "does not begin with"),
        (["[{}]"], 1, "None"),
        (["{regions}"], 2, "more than one descriptor"),
        (["{regions}"], 20, "more than one descriptor"),
        (["{regions}"], 0, "no descriptor came in time \\([0-9]+ bytes came, the last are"),
        (["{", ""], 1, "does not begin"),
        (["[{"], 1, "no complete array of regions came in time"),
        (["[" + " " * (1 << 20) + "{"], 1, "more than 1048576 bytes"),
    ],
)
def test_anything_else_is_refused_and_leaves_no_descriptor(
    listening: socket.socket, parts: list[str], fds: int, reason: str
) -> None:
    with Vmm(SIZE) as vmm:
        text = [part.replace("{regions}", json.dumps(vmm.regions)) for part in parts]
        before = descriptors()
        with pytest.raises(ValueError, match=reason):
            receive(listening, vmm, *text, fds=fds, after=0, seconds=0.5)
        assert descriptors() == before


def test_an_end_of_the_connection_is_refused(listening: socket.socket) -> None:
    one, other = socket.socketpair()
    with one, other:
        other.send(b"[{")
        other.shutdown(socket.SHUT_WR)
        with pytest.raises(ValueError, match="before the connection ended"):
            received(one, SIZE)


def test_a_connection_that_ends_without_a_word_is_told_apart() -> None:
    one, other = socket.socketpair()
    other.close()
    with one, pytest.raises(ConnectionAbortedError):
        received(one, SIZE)


def test_what_comes_must_be_a_userfaultfd_and_fit_the_image() -> None:
    text = json.dumps([{"base_host_virt_addr": PAGE, "size": SIZE, "offset": 0}]).encode()
    for size, reason in ((SIZE, "not a userfaultfd"), (2 * SIZE, "the image has 524288")):
        one, other = socket.socketpair()
        with one, other:
            before = descriptors()
            socket.send_fds(other, [text], [0])
            with pytest.raises(ValueError, match=reason):
                received(one, size)
            assert descriptors() == before
