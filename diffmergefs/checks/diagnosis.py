"""What `doctor` finds, and its findings on one layer: can its bytes and its holes be trusted?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from diffmergefs.core.beneath import AllowedRoots
from diffmergefs.core.errors import DiffMergeError, FileAccessError, counted
from diffmergefs.core.layer import Layer
from diffmergefs.opening.content import Parents, Verdicts, is_complete, sampled
from diffmergefs.opening.filled import copied_up, hint_of_filled
from diffmergefs.opening.trust import TrustPolicy, problems
from diffmergefs.opening.writers import Writers, writers
from diffmergefs.sidecars import seal
from diffmergefs.sidecars.bmap import SEAL_SUFFIX
from diffmergefs.sidecars.verified import Remembered

Severity = Literal["fine", "warning", "wrong"]


@dataclass(frozen=True)
class Finding:
    """The result of one check. `subject` is 'host' or a path, `check` the check's name.

    'wrong' is what would give wrong bytes or none if nothing refused it; a 'warning' is anything
    else that should be fixed. Only a 'fine' finding has no `why` and no `remedy`.
    """

    subject: str
    check: str
    severity: Severity
    finding: str
    why: str = ""
    remedy: str = ""


#: Why a diff's holes must be right.
HOLES = "a diff's holes tell which pages come from its parent"
_WHY = {
    "chain": "the image would not be the guest's memory",
    "access": "its bytes are unknown",
    "seal": "the seal records which bytes the file had, and where its data was",
    "filesystem": HOLES,
    "grain": "clean pages beside written ones would hide what the parent has there",
    "blocks": "holes that are reported as data would hide what the parent has there",
    "alignment": "a guest writes whole pages, so these ends are not what it wrote",
    "unwritten": "whether such a range counts as written changes with what is in the page cache",
    "map": "holes that a reader's cached pages make look like data would hide what the parent has",
    "copy-up": "holes that a copy has filled would hide what the parent has there",
}
_REMEDY = {
    "chain": "restore what is missing, or take the snapshot again; `diffmergefs list` shows what"
    " depends on it",
    "access": "make sure that this user can read it, that nobody writes to it, and that its"
    " storage works",
    "filled": "if the guest does not wipe its memory, take the diff again with write(2), and"
    " seal it as the last step; --strict refuses such a layer",
    "seal": "restore the file that was sealed, or take the diff again; if you know that its holes"
    " are right, seal it again with `diffmergefs seal --force`",
}


def wrong(subject: str, check: str, error: DiffMergeError) -> Finding:
    """The finding for an error; `check` is 'chain', 'seal' or 'access'."""
    return Finding(subject, check, "wrong", str(error), _WHY[check], _REMEDY[check])


def examine_layer(
    layer: Layer,
    parents: Parents | None,
    policy: TrustPolicy,
    verdicts: Verdicts,
    root: AllowedRoots | None = None,
    path: str | None = None,
) -> Iterator[Finding]:
    """The findings on an open layer whose seal, if any, was not applied yet.

    `parents` are the layers below a diff, base first: empty for a base, None if they are unknown. A
    layer of a directory of snapshots is `path` beneath `root`. The seal is compared with the layer,
    unless `policy.state_dir` remembers that it is right, and then applied. Results of content
    checks are kept in `verdicts`. A failure to read the layer is a finding too; nothing is raised.
    """
    has_seal = False
    try:
        for finding in _examine_seal(layer, Remembered(policy.state_dir), root, path):
            has_seal = True
            yield finding
        yield from _examine_writers(layer)
        if parents is not None and not parents.layers:
            yield Finding(layer.path, "base", "fine", "a base: its holes are zeros")
            return
        found = list(_examine_extents(layer, parents, policy, verdicts))
        yield from found
        has_record = has_seal or bool(layer.records)
        if not has_record and all(finding.severity == "fine" for finding in found):
            yield _no_seal(layer)
    except DiffMergeError as error:
        yield wrong(layer.path, "access", error)
    except OSError as error:
        yield wrong(layer.path, "access", FileAccessError(f"{layer.path}: {error.strerror}"))


def _no_seal(layer: Layer) -> Finding:
    return Finding(
        layer.path,
        "no-seal",
        "warning",
        "no seal",
        "its holes are the only record of which pages it has, and cp, cat or tar may destroy them",
        f"diffmergefs seal {layer.path}",
    )


def _examine_writers(layer: Layer) -> Iterator[Finding]:
    found = writers(layer.fd)
    if found is Writers.SOME:
        yield Finding(
            layer.path,
            "writer",
            "wrong",
            found.value,
            "its VMM or another process may still write, and then it is neither the old nor the"
            " new memory",
            "wait until it is closed (lsof and fuser list the processes)",
        )
    elif found is not Writers.NONE:
        yield Finding(
            layer.path,
            "writer",
            "warning",
            found.value,
            "a diff that its VMM still writes to looks like a finished one",
            "use only what its VMM has closed; root can ask for any file",
        )


def _examine_seal(
    layer: Layer, memory: Remembered, root: AllowedRoots | None, path: str | None
) -> Iterator[Finding]:
    # If the seal cannot be used, the former extents stay, so that other problems are found too.
    place = layer.path + SEAL_SUFFIX
    known = layer.extents, layer.records
    try:
        stored = seal.find(path or layer.path, root, layer.path)
        if stored is None:
            return
        is_newer = layer.status.st_mtime_ns > stored.key.mtime_ns
        seal.adopt(layer, stored, is_checked=True)
        seal.compare_once(layer, stored, memory)
    except DiffMergeError as error:
        layer.extents, layer.records = known
        yield wrong(place, "seal", error)
        return
    if not is_newer:
        yield Finding(place, "seal", "fine", "the layer is what its seal records")
        return
    yield Finding(
        place,
        "newer",
        "warning",
        "the layer was written or copied after its seal, but is what the seal records",
        "a write to it makes the seal stale, and then both are refused",
        f"keep the seal, and make sure that nothing writes to {layer.path}",
    )


def _examine_extents(
    layer: Layer, parents: Parents | None, policy: TrustPolicy, verdicts: Verdicts
) -> Iterator[Finding]:
    dense = layer.extents.covers(layer.size)
    failed = list(problems(layer, policy.page_size, complete=dense and parents is not None))
    # Another size is a finding on the chain.
    fit = parents is None or parents.layers[0].size == layer.size
    if fit and (problem := copied_up(parents, layer, policy, verdicts)):
        failed.append(problem)
    for problem in failed:
        # Without the parents it is unknown whether zeros hide any of their data.
        severity: Severity = "wrong" if parents or problem.check != "copy-up" else "warning"
        why = _WHY[problem.check]
        yield Finding(layer.path, problem.check, severity, problem.text, why, problem.remedy)
    if dense:
        yield from _examine_dense(layer, parents, verdicts) if fit else ()
    elif parents and fit and (hint := hint_of_filled(parents, layer, policy, verdicts)):
        why = "a store through a mapping, or a reader of a tmpfs, fills holes with zeros"
        yield Finding(layer.path, "filled", "warning", hint.text, why, _REMEDY["filled"])
    elif not failed:
        extents = counted(len(layer.extents), "extent")
        text = f"{layer.extents.data_bytes} bytes in {extents} can be trusted"
        yield Finding(layer.path, "extents", "fine", text)


def _examine_dense(layer: Layer, parents: Parents | None, verdicts: Verdicts) -> Iterator[Finding]:
    why = "as a diff it hides all layers below; a diff whose holes a copy filled looks the same"
    if parents is None:
        text = f"no hole in {layer.size} bytes"
        remedy = (
            "a base or another complete image (--dense) may have none; otherwise put its seal"
            " beside it, or take the diff again"
        )
        yield Finding(layer.path, "dense", "wrong", text, why, remedy)
        return
    pages = sampled(parents, layer, verdicts)
    text = f"of {pages.over} pages that are not zeros below {pages.zero} are zeros here"
    text += f" and {pages.equal} equal"
    if is_complete(pages):
        yield Finding(layer.path, "dense", "fine", f"no hole: a complete image; {text}")
        return
    remedy = "take the diff again, or put its seal beside it; --dense vouches for a complete image"
    yield Finding(layer.path, "dense", "wrong", f"no hole, and {text}", why, remedy)
