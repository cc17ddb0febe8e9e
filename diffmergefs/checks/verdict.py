"""The result of `verify`: the layers of an image, and all faults."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from diffmergefs.core.errors import DiffMergeError, UntrustedExtentsError, WriterError

# Where the kind of a fault is not the `check` of its error.
_KINDS: dict[type[DiffMergeError], str] = {
    UntrustedExtentsError: "extents",
    WriterError: "writer",
}


@dataclass(frozen=True)
class Fault:
    """One fault: its kind, and a line with the path and the next step.

    Kinds are 'chain' (a missing parent, a cycle, metadata), 'size', 'extents' (law 4), 'dense',
    'pin' (a parent whose content is not what was recorded), 'seal' (a layer that is not what its
    seal records, or a seal that cannot be used), 'presence' (the same for a presence file),
    'format' (not a memory image), 'writer' (a process has it open for writing), 'changed' (while it
    was read), 'access' and 'other'.
    """

    kind: str
    message: str


@dataclass(frozen=True)
class LayerVerdict:
    """One layer of the image: `tag` in a directory of snapshots, `size` in bytes if it opened.

    `pin` is about the hash of its parent: 'verified', 'wrong', 'unpinned' (none is recorded),
    'unknown' (the parent could not be read), or None if no parent is recorded. `seal` is
    'verified', 'wrong', or None if it has none.
    """

    tag: str | None
    path: str | None
    size: int | None
    pin: str | None
    seal: str | None


@dataclass(frozen=True)
class Verdict:
    """The result: the layers that were found, base first, and all faults.

    `overridden` has a line for each check of law 4 that failed and that the policy overrode,
    `hints` one for each layer that may be damaged although nothing proves it.
    """

    layers: tuple[LayerVerdict, ...]
    faults: tuple[Fault, ...]
    overridden: tuple[str, ...]
    hints: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether there is no fault."""
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        """The same as nested dictionaries and lists, ready for JSON."""
        return {"sound": self.sound, **asdict(self)}


class Faults(list[Fault]):
    """The faults that were found so far."""

    def add(self, error: DiffMergeError) -> None:
        """Record an error as a fault."""
        kind = _KINDS.get(type(error), error.check) or "other"
        self.append(Fault(kind, str(error)))

    @contextmanager
    def noted(self, path: str | None = None) -> Iterator[None]:
        """Record a DiffMergeError or OSError that ends the block; `path` is the file of the latter.

        Other exceptions pass: they are not faults of the image.
        """
        try:
            yield
        except DiffMergeError as error:
            self.add(error)
        except OSError as error:
            self.append(Fault("access", f"{path or error.filename}: {error.strerror}"))
