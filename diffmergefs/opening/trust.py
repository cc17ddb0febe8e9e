"""Law 4: when a diff's data extents can be trusted. Nothing of it applies to a base."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from diffmergefs.core.errors import UntrustedExtentsError
from diffmergefs.core.extents import PAGE, is_aligned
from diffmergefs.core.layer import Layer
from diffmergefs.opening.filesystems import untrusted_filesystem
from diffmergefs.stores.catalog import StoreOptions

#: The checks of law 4 that a user may override by their names.
CHECKS = ("filesystem", "grain", "alignment", "unwritten", "map", "copy-up")
#: The name that stands for all of these checks.
ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What a user vouches for about the layers of an image.

    `page_size` is the guest's page in bytes, a power of two. `trust_grain` names the checks that
    are overridden: names of `CHECKS`, or 'all'. `dense` accepts a diff without a hole.
    `allow_writers` accepts layers that someone has open for writing. `strict` refuses a diff whose
    holes look filled, for which there is otherwise only a hint. Raises ValueError for a page size
    that is not a power of two, and for an unknown check.
    """

    page_size: int = PAGE
    trust_grain: Collection[str] = frozenset()
    dense: bool = False
    allow_writers: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        if self.page_size < 1 or self.page_size & (self.page_size - 1):
            raise ValueError(f"a page of {self.page_size} bytes, which is not a power of two")
        object.__setattr__(self, "trust_grain", checks_named(self.trust_grain))

    def overrides(self, check: str) -> bool:
        """Whether the user vouches for what this check refuses."""
        return check in self.trust_grain


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """How recorded checksums are used.

    `no_seal` ignores seals. `verify` says which checksums are compared: 'no', 'pins' (seals and
    parents' hashes, once for each file) or 'full' (the same, but earlier results are ignored).
    `state_dir` is where results are remembered, by default the user's state directory. Raises
    ValueError for another `verify`.
    """

    no_seal: bool = False
    verify: str = "pins"
    state_dir: str | None = None

    def __post_init__(self) -> None:
        if self.verify not in ("no", "pins", "full"):
            raise ValueError(f"verify is {self.verify!r}, not 'no', 'pins' or 'full'")

    @property
    def compares(self) -> bool:
        """Whether checksums are compared at all."""
        return self.verify != "no"

    @property
    def anew(self) -> bool:
        """Whether earlier results are ignored."""
        return self.verify == "full"


@dataclass(frozen=True, kw_only=True)
class TrustPolicy(StoreOptions, RecordOptions, Trust):
    """All that a caller says about an image: `Trust`, `RecordOptions` and `StoreOptions`.

    Raises ValueError as those do.
    """

    def __post_init__(self) -> None:
        Trust.__post_init__(self)
        RecordOptions.__post_init__(self)


def checks_named(names: Collection[str]) -> frozenset[str]:
    """The checks that `names` stand for; 'all' stands for all of `CHECKS`.

    Raises ValueError for an unknown name, and if `names` is not a collection of names.
    """
    if isinstance(names, str) or not isinstance(names, Collection):
        raise ValueError(f"trust_grain is {names!r}, not a set of names of checks")
    for name in names:
        if name not in (*CHECKS, ALL):
            raise ValueError(
                f"{name!r} is not a check; the checks are {', '.join(CHECKS)}, or {ALL}"
            )
    return frozenset(CHECKS if ALL in names else names)


@dataclass(frozen=True)
class Problem:
    """A check of law 4 that the diff `path` fails: what was found, and what to do.

    `check` is 'filesystem', 'grain', 'blocks', 'alignment', 'unwritten', 'map' or 'copy-up'.
    """

    path: str
    check: str
    text: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}; {self.remedy}"

    @property
    def override(self) -> str:
        """The line for the user that says that the policy overrides the check."""
        return f"--trust-grain overrides the check of {self.check}: {self}"


def grain(fd: int) -> int:
    """The unit in bytes in which the filesystem of `fd` reports holes: its `st_blksize`.

    Confirmed by measurement on ext4, xfs, btrfs and tmpfs (16384 on xfs with 16 KiB blocks, 2 MiB
    on tmpfs with huge=always); on a network filesystem it is a hint.
    """
    return os.fstat(fd).st_blksize


def require_trust(layer: Layer, policy: Trust, *, complete: bool = False) -> list[Problem]:
    """Raise UntrustedExtentsError for the first check that a diff's extents fail.

    Extents from a sidecar (a seal, a presence file) must only fit the sidecar's grain and
    alignment: the filesystem on which the file lies now does not matter.

    Returns the failed checks that `policy.trust_grain` names. `complete` says that the diff is a
    complete image: it has no hole and is meant so. Then only the checks that could make it look
    complete count. Reads metadata only.
    """
    return require_none(problems(layer, policy.page_size, complete=complete), policy)


def require_none(found: Iterable[Problem], policy: Trust) -> list[Problem]:
    """Raise UntrustedExtentsError for the first problem that the policy does not override.

    Returns those that it does.
    """
    overridden = []
    for problem in found:
        if not policy.overrides(problem.check):
            raise UntrustedExtentsError(str(problem), problem.check)
        overridden.append(problem)
    return overridden


def override_lines(overridden: Iterable[Problem]) -> list[str]:
    """A line for the user about each problem that the policy overrides."""
    return [problem.override for problem in overridden]


def problems(layer: Layer, page: int, *, complete: bool = False) -> Iterator[Problem]:
    """Every check of law 4 that a diff of pages of `page` bytes fails, in order.

    `complete` is `require_trust`'s. Reads metadata only; raises OSError as fstat does.
    """
    if layer.records:
        return _problems_of_records(layer, page, complete)
    return _problems_of_walk(layer, page, complete)


_INSTEAD = {
    "filesystem": "take the diff again on ext4, xfs, btrfs or tmpfs without huge pages",
    "grain": "take the diff again where blocks are no larger than the guest's page, which"
    " --page-size names",
    "alignment": "name the guest's page with --page-size if it is another, take the diff again",
    "unwritten": "take the diff again without preallocating it",
}


def problem_of(layer: Layer, check: str, text: str, instead: str | None = None) -> Problem:
    """The problem `text` that the check has with the layer, with a remedy.

    `instead` is the remedy's first step. By default it depends on the check.
    """
    if check == "blocks":
        remedy = "store the diff on a filesystem that reports holes, or put its seal beside it"
    else:
        instead = instead or _INSTEAD.get(check, "take the diff again")
        remedy = (
            f"{instead}, put its seal beside it if it has one, or vouch for it with"
            f" --trust-grain={check} (if it is damaged, the guest gets wrong bytes)"
        )
    return Problem(layer.path, check, text, remedy)


def _problems_of_records(layer: Layer, page: int, complete: bool) -> Iterator[Problem]:
    # The filesystem's extents do not count, only the unit in which the sidecar was made.
    if complete:
        return
    for record in layer.records:
        made = f"{record.path} was made in blocks of"
        yield from _coarseness(layer, made, record.block, page)
    yield from _misalignment(layer, page)


def _problems_of_walk(layer: Layer, page: int, complete: bool) -> Iterator[Problem]:
    problem = functools.partial(problem_of, layer)
    if reason := untrusted_filesystem(layer.fd):
        yield problem("filesystem", reason)
    unit = grain(layer.fd)
    if not complete:
        yield from _coarseness(layer, "its filesystem reports holes in units of", unit, page)
    held = os.fstat(layer.fd).st_blocks * 512
    if layer.extents.data_bytes > held:
        yield problem(
            "blocks",
            f"{layer.extents.data_bytes} bytes are reported as data but only {held} are stored,"
            " so holes are reported as data",
        )
    if not complete:
        yield from _misalignment(layer, page)
    if len(layer.unwritten):
        found = next(iter(layer.unwritten))
        yield problem(
            "unwritten",
            f"[{found.start}, {found.stop}) is preallocated and unwritten, which is reported"
            " as data or as a hole by chance",
        )
    yield from _contradictions(layer)


def _coarseness(layer: Layer, made: str, unit: int, page: int) -> Iterator[Problem]:
    if page % unit:
        yield problem_of(
            layer,
            "grain",
            f"{made} {unit} bytes, coarser than the guest page of {page}, so clean pages beside"
            " written ones would count as written",
        )


def _misalignment(layer: Layer, page: int) -> Iterator[Problem]:
    # Only the first extent that does not fit is named.
    for start, stop in zip(layer.extents.starts, layer.extents.stops, strict=True):
        if not is_aligned(start, stop, page, layer.size):
            text = f"the data extent [{start}, {stop}) does not begin and end on a page of {page}"
            yield problem_of(layer, "alignment", f"{text} bytes")
            return


def _contradictions(layer: Layer) -> Iterator[Problem]:
    if len(layer.unmapped):
        yield problem_of(
            layer,
            "map",
            f"{layer.unmapped.data_bytes} bytes from {layer.unmapped.starts[0]} on are reported as"
            " data, but nothing is stored for them: holes look so while their pages are cached, and"
            " stay cached as long as someone maps or reads the file",
            "try again when no process has it mapped (fuser lists them)",
        )
    if len(layer.unreported):
        found = next(iter(layer.unreported))
        yield problem_of(
            layer,
            "map",
            f"[{found.start}, {found.stop}) is reported as a hole, but its filesystem has bytes"
            " stored there",
        )
