"""Page servers in the output of `status`: those that answer, and those that do not."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from diffmergefs.cli import servers
from diffmergefs.cli.mounted import read_metrics
from diffmergefs.core.errors import MountFailedError, MountTimeoutError
from diffmergefs.system import children
from diffmergefs.uffd.listener import status_listener
from diffmergefs.uffd.status import Counters, Ledger, Served, Status, rendered


def status(path: Path) -> Status:
    ledger = Ledger(str(path), "/srv/base", 8192, accepted=3, refused=2)
    ledger.ended.fault(3000)
    ledger.ended.supply({-1: 100, 1: 4096})
    return ledger.status([(Served(7, 1234, "/srv/base", 0.0, 5, "it hangs"), Counters())])


@contextmanager
def answering(text: bytes | None, metrics: bytes = b"") -> Iterator[None]:
    """A server whose status socket gives this answer to each question, or none at all."""
    with status_listener() as listening:

        def answer() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    asked = connection.recv(64)
                    if text is None:
                        ended.wait(30)
                    else:
                        connection.sendall(metrics if asked == b"metrics\n" else text)

        ended = threading.Event()
        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


def mine(path: Path) -> list[servers.ListedServer]:
    own = f"uffd/{os.getpid()}-"
    return [e for e in servers.list_servers() if e.socket == str(path) or own in e.socket]


def test_a_server_is_listed_and_found_by_its_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    known = status(path)
    with answering(rendered("status.json", known), b"metrics 1\n"):
        (listed,) = mine(path)
        assert listed == servers.ListedServer(
            str(path), "/srv/base", os.geteuid(), "serving", None, known
        )
        assert servers.row(listed, timedelta(0))[:4] == (
            *(str(path), "/srv/base"),
            *(os.geteuid(), "serving"),
        )
        assert servers.read_server(str(path)) == known
        assert servers.exposition_of(str(path), "metrics") == b"metrics 1\n"
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
            assert read_metrics(str(path)) == "metrics 1\n"
    assert mine(path) == []
    with pytest.raises(MountFailedError, match="no page server of this user serves it"):
        servers.read_server(str(path))


def test_the_tables_have_its_numbers(tmp_path: Path) -> None:
    facts, vms, supplied = servers.tables(status(tmp_path / "socket"), timedelta(0))
    told: dict[object, object] = dict(facts[1])  # type: ignore[arg-type]
    assert told["VMs"] == "1 connected, 3 served, 2 refused, 0 failed"
    assert told["faults"] == "1, 3 us each"
    assert vms[1] == [(7, 1234, "/srv/base", 5, "it hangs")]
    assert supplied[1] == [("hole", 100), (1, 4096)]


def test_one_that_does_not_answer_is_hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "ANSWER_SECONDS", 0.2)
    with answering(None):
        (listed,) = mine(tmp_path)
        assert (listed.state, listed.status) == ("hung", None)
        with pytest.raises(MountTimeoutError, match="does not answer"):
            servers.read_server(str(tmp_path / "socket"))


def test_one_of_another_version_is_unreadable(tmp_path: Path) -> None:
    with answering(b"{}"):
        (listed,) = mine(tmp_path)
        assert listed.state == "unreadable" and "another version" in str(listed.problem)


def test_a_path_without_a_socket_is_none(tmp_path: Path) -> None:
    assert not servers.is_socket(str(tmp_path)) and not servers.is_socket(str(tmp_path / "none"))
