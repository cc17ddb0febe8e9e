"""The page servers of `uffd` in the output of `status`."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from diffmergefs.cli.output import sized
from diffmergefs.core.errors import FileAccessError, MountFailedError, MountTimeoutError, counted
from diffmergefs.fuse.status import STATUS_FILE
from diffmergefs.system import children
from diffmergefs.system.mounttable import mount_over, resolved
from diffmergefs.uffd.listener import asked, status_sockets
from diffmergefs.uffd.status import Status

_OWNER_BYTES = 4


@dataclass(frozen=True)
class ListedServer:
    """A page server in the output of `status`, `user` by its uid.

    `state` is 'serving', 'stopping' (it takes no new VMs), 'hung' (no answer), or 'unreadable'. In
    the last two, `problem` is the whole message, and `status` is None.
    """

    socket: str
    image: str | None
    user: int | None
    state: str
    problem: str | None
    status: Status | None


def list_servers() -> list[ListedServer]:
    """The page servers of this user, or those of all users for root, by their sockets."""
    names = status_sockets()
    questions = [partial(_ask, name, STATUS_FILE) for name in names]
    answers = children.ask_all(questions, children.ANSWER_SECONDS)
    found = map(_listed, names, answers)
    return sorted((each for each in found if each is not None), key=lambda each: each.socket)


def is_socket(path: str) -> bool:
    """Whether a socket is at this path, or a page server's directory of sockets.

    Never accesses a mount of ours, which shows no socket.
    """
    over = mount_over(resolved(path))
    if over is not None and over.is_ours:
        return False
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    if stat.S_ISDIR(mode) and (over is None or over.path != resolved(path)):
        real = resolved(path)
        return any(each.status and resolved(each.socket) == real for each in list_servers())
    return stat.S_ISSOCK(mode)


def read_server(path: str) -> Status:
    """The status of the page server whose socket is at `path`, or was until it was stopped.

    The path may also be that of its directory of sockets, or of one in it.

    Raises MountFailedError if there is none, MountTimeoutError if it may be one that hangs.
    """
    real = resolved(path)
    servers = list_servers()
    for each in servers:
        if each.status is None:
            continue
        place = resolved(each.socket)
        if place == real or (each.status.size is None and real.startswith(f"{place}/")):
            return each.status
    for each in servers:
        if each.state == "hung":
            raise MountTimeoutError(f"{path}: no answer, but {each.problem}")
    raise MountFailedError(
        f"{path}: no page server of this user serves it; start `diffmergefs uffd` again"
    )


def exposition_of(path: str, name: str) -> bytes:
    """The answer of the server at `path` to the line `name`. Raises as `read_server`."""
    pid = read_server(path).pid
    for each in status_sockets():
        if each.partition("/")[2].partition("-")[0] == str(pid):
            try:
                return asked(each, name, children.ANSWER_SECONDS)[1]
            except OSError as error:
                raise FileAccessError(f"{path}: {error.strerror}") from error
    raise MountFailedError(f"{path}: its server has just ended")


def _ask(name: str, what: str) -> bytes:
    # In a child process, which is ended if this takes too long.
    uid, answer = asked(name, what, 2 * children.ANSWER_SECONDS)
    return uid.to_bytes(_OWNER_BYTES) + answer


def _listed(name: str, answer: bytes | OSError) -> ListedServer | None:
    if isinstance(answer, TimeoutError):
        problem = f"the page server @{name} does not answer; find out what its process waits for"
        return ListedServer(f"@{name}", None, None, "hung", problem, None)
    if isinstance(answer, OSError):
        return None  # another user's, or it has just ended
    uid = int.from_bytes(answer[:_OWNER_BYTES])
    if os.geteuid() not in (0, uid):
        return None
    try:
        status = Status.from_json(answer[_OWNER_BYTES:])
    except ValueError as error:
        problem = f"the page server @{name}: {error}; another version of diffmergefs serves it"
        return ListedServer(f"@{name}", None, uid, "unreadable", problem, None)
    state = "stopping" if status.stopping else "serving"
    return ListedServer(status.socket, status.image, uid, state, None, status)


#: The columns of `rows`.
COLUMNS = ("SOCKET", "IMAGE", "USER", "STATE", ">PID", ">UP", ">VMS")


def row(each: ListedServer, up: timedelta | None) -> tuple[object, ...]:
    """The row of a server."""
    numbers = (each.status.pid, up, len(each.status.vms)) if each.status else ()
    return each.socket, each.image, each.user, each.state, *numbers


Table = tuple[tuple[str, ...], Sequence[tuple[object, ...]]]


def tables(found: Status, up: timedelta) -> Iterator[Table]:
    """The tables for the status of one server."""
    yield ("WHAT", "NOW"), list(_facts(found, up))
    if found.vms:
        rows = [(vm.pid, vm.uid, vm.image, vm.faults, vm.problem or "served") for vm in found.vms]
        yield (">PID", ">USER", "IMAGE", ">FAULTS", "STATE"), rows
    if found.supplied:
        supplied = [
            ("hole" if each.layer is None else each.layer, each.bytes) for each in found.supplied
        ]
        yield ("LAYER", "=BYTES"), supplied


def _facts(found: Status, up: timedelta) -> Iterator[tuple[str, str]]:
    yield "server", f"pid {found.pid}, version {found.version}, up {up}"
    if found.size is None:
        yield "source", found.image
    else:
        yield "image", f"{found.image}, {sized(found.size, 'bytes')}"
    yield "state", "takes no new VMs" if found.stopping else "serving"
    yield (
        "VMs",
        f"{len(found.vms)} connected, {found.accepted} served, {found.refused} refused,"
        f" {found.failed} failed",
    )
    mean = f", {found.fault_seconds / found.faults * 1e6:.0f} us each" if found.faults else ""
    yield "faults", f"{found.faults}{mean}"
    yield "copied", sized(found.copied_bytes, "bytes")
    yield "zeros", sized(found.zero_bytes, "bytes")
    yield "given away", sized(found.removed_bytes, "bytes")
    yield "prefetch", f"{sized(found.prefetched_bytes, 'bytes')} copied ahead"
    yield "tainted", counted(found.tainted_layers, "layer")
