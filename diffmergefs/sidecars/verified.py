"""A memory of what was verified, in the user's state directory, by the file's identity."""

from __future__ import annotations

import logging
import os
import pwd
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import NamedTuple

from diffmergefs.core.errors import one_line
from diffmergefs.core.failures import failures
from diffmergefs.core.identity import FileVersion
from diffmergefs.core.layer import Layer

log = logging.getLogger(__name__)

ROOTS_DIRECTORY = "/var/lib/diffmergefs"
MAX_REMEMBERED = 65_536

# The number is the version of the table's schema.
_DATABASE = "verified-1.sqlite3"
_TABLE = """
CREATE TABLE IF NOT EXISTS verified (
    kind TEXT NOT NULL, path BLOB NOT NULL, identity TEXT NOT NULL, value TEXT NOT NULL,
    UNIQUE (kind, path) ON CONFLICT REPLACE
)
"""
_DROP_OLDEST = """
DELETE FROM verified
WHERE rowid IN (SELECT rowid FROM verified ORDER BY rowid DESC LIMIT -1 OFFSET ?)
"""
_BUSY_SECONDS = 5.0
TICK_NS = 50_000_000  # the kernel's clock for time stamps ticks every 10 ms at worst
COARSE_TICK_NS = 2_000_000_000  # on filesystems that store whole seconds


class Identity(NamedTuple):
    """A version of a file under a path (`core.identity` compares it with the other identities).

    `path` should be absolute: a later run looks the file up by it. A chmod or a rename makes
    another identity; that only costs another check.
    """

    path: str
    version: FileVersion

    @classmethod
    def of_open(cls, fd: int) -> Identity:
        """The identity of an open file under its real path, which any later run will use too."""
        return cls(os.readlink(f"/proc/self/fd/{fd}"), FileVersion.of(os.fstat(fd)))

    def is_final(self, since_ns: int) -> bool:
        """Whether a write after the time `since_ns` is certain to make another identity.

        Time stamps have a resolution: a write within the same tick as the last one moves none.
        """
        ctime_ns = self.version.ctime_ns
        tick = TICK_NS if ctime_ns % 1_000_000_000 else COARSE_TICK_NS
        return ctime_ns + tick < since_ns


class Remembered:
    """What earlier runs verified of files; safe for several threads, forks and processes.

    `directory` holds the database: by default `default_directory()`. It is created when something
    is first remembered. A directory that the effective user does not own, or that others may write
    to, is not used, since anyone could have planted a verdict there. Nothing here raises: if the
    directory or the database cannot be used, the reason is logged once, and nothing is known. A
    damaged database is renamed to `*.corrupt`. At most `MAX_REMEMBERED` entries are kept, one per
    kind and path; the oldest are dropped first.

    Kinds are 'sha256' (the value is the hex digest of the file's content), 'seal' and 'presence'
    (the value is the sha256 of the sidecar whose comparison the file passed); `opening.content`
    has its own.
    """

    def __init__(self, directory: str | None = None) -> None:
        self._logged = False
        self._directory = directory
        if directory is None:
            try:
                self._directory = default_directory()
            except KeyError:
                self._warn(f"user {os.geteuid()} has no home directory; --state-dir names another")

    def compare_once(
        self,
        kind: str,
        layer: Layer,
        digest: str,
        compare: Callable[[], None],
        *,
        anew: bool,
    ) -> None:
        """Compare the layer with the sidecar of this sha256, unless `anew` is false and it passed.

        `compare` raises if it does not pass; an OSError becomes a FileAccessError. Otherwise the
        success is remembered.
        """
        with failures(layer.path):
            identity, since_ns = Identity.of_open(layer.fd), time.time_ns()
            if not anew and self.recall(kind, identity) == digest:
                layer.check_unchanged()
                return
            compare()
            self.remember(kind, identity, digest, since_ns)

    def recall(self, kind: str, identity: Identity) -> str | None:
        """The value remembered for the file with exactly this identity, or None."""
        with (
            self._forgiven(),
            suppress(FileNotFoundError),  # nothing was remembered yet
            closing(self._connection(make=False)) as connection,
        ):
            row = connection.execute(
                "SELECT value FROM verified WHERE kind = ? AND path = ? AND identity = ?",
                (kind, os.fsencode(identity.path), _facts(identity)),
            ).fetchone()
            return row[0] if row and isinstance(row[0], str) else None
        return None

    def remember(
        self, kind: str, identity: Identity, value: str, since_ns: int | None = None
    ) -> None:
        """Keep `value` for the file with this identity, in place of what its path had before.

        `since_ns` is the `time.time_ns()` before the first byte was read, by default now. If the
        file had changed so shortly before that its identity might miss a write during the read,
        nothing is kept.
        """
        if not identity.is_final(time.time_ns() if since_ns is None else since_ns):
            return
        with self._forgiven(), closing(self._connection(make=True)) as connection, connection:
            connection.execute(
                "INSERT INTO verified VALUES (?, ?, ?, ?)",
                (kind, os.fsencode(identity.path), _facts(identity), value),
            )
            connection.execute(_DROP_OLDEST, (MAX_REMEMBERED,))

    def _connection(self, *, make: bool) -> sqlite3.Connection:
        # One per call, so that no connection is shared by threads or inherited by a fork.
        if self._directory is None:
            raise FileNotFoundError  # already logged by __init__
        path = os.path.join(self._directory, _DATABASE)
        if make:
            os.makedirs(self._directory, mode=0o700, exist_ok=True)
        require_own(self._directory, os.stat(self._directory))
        if make:
            # Not open(): a close would release the locks that another thread's SQLite holds.
            with suppress(FileExistsError):
                os.mknod(path, stat.S_IFREG | 0o600)
        require_own(path, os.lstat(path))
        connection = sqlite3.connect(path, timeout=_BUSY_SECONDS)
        try:
            connection.execute(_TABLE)
        except BaseException:
            connection.close()
            raise
        return connection

    @contextmanager
    def _forgiven(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._warn(f"{error.filename or self._directory}: {error.strerror}")
        except sqlite3.OperationalError as error:
            self._warn(f"{self._directory}: {error}")
        except sqlite3.DatabaseError as error:
            self._set_aside(error)

    def _set_aside(self, error: sqlite3.DatabaseError) -> None:
        path = os.path.join(self._directory or "", _DATABASE)
        self._warn(f"{path}: {error}; set aside as {_DATABASE}.corrupt")
        with suppress(OSError):
            os.replace(path, f"{path}.corrupt")

    def _warn(self, reason: str) -> None:
        if not self._logged:
            self._logged = True
            log.warning(
                "%s: verification results are not stored; the next run verifies again",
                one_line(reason),
            )


def default_directory() -> str:
    """The state directory of the effective user. Raises KeyError if that user has no home.

    Root's is fixed: the environment may come from another user, who could name a directory of
    their own.
    """
    if os.geteuid() == 0:
        return ROOTS_DIRECTORY
    states = os.environ.get("XDG_STATE_HOME", "")
    if not states.startswith("/"):
        states = os.path.join(pwd.getpwuid(os.geteuid()).pw_dir, ".local/state")
    return os.path.join(states, "diffmergefs")


def _facts(identity: Identity) -> str:
    # As text: device and inode numbers have 64 bits, SQLite's integers have 63.
    return ":".join(str(number) for number in identity.version)


def require_own(path: str, status: os.stat_result) -> None:
    """Raise OSError unless the effective user owns `path`, and nobody else may write to it.

    It must be a directory or a regular file. Content that others could have planted is not used.
    """
    kind = stat.S_IFMT(status.st_mode)
    if kind not in (stat.S_IFDIR, stat.S_IFREG):
        raise OSError(0, "is neither a directory nor a file", path)
    if status.st_uid != os.geteuid():
        raise OSError(0, f"belongs to user {status.st_uid}, not to {os.geteuid()}", path)
    if status.st_mode & 0o022:
        mode = stat.S_IMODE(status.st_mode)
        raise OSError(0, f"others may write to it (mode {mode:04o}); chmod go-w", path)
