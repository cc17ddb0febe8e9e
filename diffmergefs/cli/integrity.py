"""`seal` and `verify`: record what is right about layers, and check them against it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict

import click

from diffmergefs.checks import verify as verification
from diffmergefs.checks.verdict import Verdict
from diffmergefs.cli.inputs import ImageArguments, image_or_store_argument
from diffmergefs.cli.options import (
    PATH,
    json_option,
    layer_options,
    layout_options,
    store_options,
    strict_option,
    trust_options,
    trust_options_without_records,
)
from diffmergefs.cli.output import (
    print_diagnostic,
    print_json,
    print_table,
    printable,
    progress,
    sized,
)
from diffmergefs.cli.usage import Verb, error_line
from diffmergefs.core.errors import DiffMergeError, counted
from diffmergefs.opening.images import open_chain
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.stores.catalog import Catalog
from diffmergefs.stores.lookup import find_store
from diffmergefs.writing.sealing import SealResult, seal_layer, seal_store

_jobs_option = click.option(
    "--jobs",
    type=click.IntRange(1, 256),
    metavar="N",
    help="Read N files at a time (default: one per processor).",
)


@click.command(cls=Verb)
@click.argument("layers", metavar="[LAYER|SOURCE]...", nargs=-1, type=PATH)
@layer_options
@click.option(
    "--force",
    is_flag=True,
    help="Replace a seal that does not match the layer. If a copy has damaged the layer's holes,"
    " that seal was their only record.",
)
@_jobs_option
@json_option
@layout_options
@trust_options_without_records
@strict_option
@store_options
def seal(
    layers: tuple[str, ...],
    base: str | None,
    diffs: tuple[str, ...],
    force: bool,
    jobs: int | None,
    as_json: bool,
    layout: str | None,
    suffix: str | None,
    policy: TrustPolicy,
) -> int:
    """Write a seal beside each LAYER: LAYER.bmap records where the data is, with checksums.

    The holes of a diff have a meaning, and ordinary copies (cp, cat, tar) destroy them silently.
    A copy with its seal beside it still merges correctly: every command takes the extents from the
    seal, after comparing its checksums with the bytes. Seal a diff where it was taken, as soon as
    its VMM has closed it.

    Name the layers below with --base and --diff, oldest first. Then each LAYER, or each --diff if
    you name no LAYER, is compared with the layers before it. If its holes look filled, a hint says
    so, because a seal would make that permanent; --strict refuses the layer.

    The format is bmap 2.0, which bmaptool(1) also reads and writes. An existing seal that does not
    match the layer is replaced only with --force. All layers are tried; the exit code is that of
    the first failure.

    With a directory of snapshots, SOURCE, the layer of each snapshot is sealed over its parents.
    A base needs no --dense. The exit code is 1 if a snapshot could not be sealed.

    \b
    Examples:
      diffmergefs seal mem_diff
      diffmergefs seal --strict --base mem_file mem_diff
      diffmergefs seal /srv/snapshots
    """
    if not (layers or diffs):
        raise click.UsageError("name the layers to seal, or a directory of snapshots")
    if folders := [path for path in layers if os.path.isdir(path)]:
        if base is not None or len(layers) > 1:
            raise click.UsageError(
                f"{folders[0]}: a directory of snapshots is sealed alone, without other layers,"
                " --base and --diff"
            )
        with progress("open", unit=""):
            catalog = find_store(folders[0], layout, suffix, policy)
        if catalog is None:
            raise click.UsageError(
                f"{folders[0]}: is one snapshot; name its memory file, or the directory of all"
            )
        return _seal_store(catalog, force, policy, jobs, as_json)
    for name, is_given in (("layout", layout), ("suffix", suffix), ("jobs", jobs)):
        if is_given:
            raise click.UsageError(f"--{name} needs a directory of snapshots")
    if base is None and (diffs or policy.strict):
        raise click.UsageError("--diff and --strict need --base, the base below the layers")
    done: list[SealResult] = []
    failed = 0
    chain = (base, *diffs, *layers)
    printed: set[str] = set()
    for number in range(1 if not layers else 1 + len(diffs), len(chain)):
        below = [path for path in chain[:number] if path]
        try:
            done.append(_seal(str(chain[number]), below if base else [], force, policy, printed))
        except DiffMergeError as error:
            print_diagnostic(error_line(error))
            failed = failed or error.exit_code
    _print_seals(done, as_json)
    return failed


def _seal_store(
    catalog: Catalog, force: bool, policy: TrustPolicy, jobs: int | None, as_json: bool
) -> int:
    with progress("seal", len(catalog.snapshots), unit="layers") as advance:
        found = seal_store(
            catalog, force=force, policy=policy, jobs=jobs or os.cpu_count() or 1, progress=advance
        )
    done = [result for result in found.values() if isinstance(result, SealResult)]
    lines = (line for result in done for line in (*result.overridden, *result.hints))
    failures = [f"{tag}: {r}" for tag, r in found.items() if isinstance(r, DiffMergeError)]
    print_diagnostic(*dict.fromkeys(lines), *failures)
    _print_seals(done, as_json)
    return 1 if failures else 0


def _print_seals(done: list[SealResult], as_json: bool) -> None:
    if as_json:
        print_json([asdict(result) for result in done])
    elif done:
        print_table(
            ("SEAL", "DONE", ">RANGES", "=DATA", ">BLOCK"),
            ((r.path, r.outcome, r.ranges, r.data_bytes, r.block) for r in done),
        )


def _seal(
    layer: str, below: list[str], force: bool, policy: TrustPolicy, printed: set[str]
) -> SealResult:
    known = open_chain(below[0], below[1:], policy) if below else None
    what = f"seal {os.path.basename(layer)}"
    with known.view if known else nullcontext(), progress(what) as advance:
        parents = known.view.layers if known else ()
        result = seal_layer(layer, force=force, policy=policy, parents=parents, progress=advance)
    for line in (*(known.overridden if known else ()), *result.overridden, *result.hints):
        if line not in printed:  # the next layer has the same layers below it, and one more
            print_diagnostic(line)
        printed.add(line)
    return result


_NAMED = 8  # how many unpinned parents the summary names


@click.command(cls=Verb)
@trust_options
@store_options
@image_or_store_argument
@layout_options
@strict_option
@_jobs_option
@json_option
def verify(
    source: ImageArguments,
    layout: str | None,
    suffix: str | None,
    jobs: int | None,
    as_json: bool,
) -> int:
    """Check every layer of IMAGE against everything recorded about it. Print one line per fault.

    With a directory of snapshots, SOURCE, all of them are checked, with a line for each that is
    sound. Each layer is read once.

    The checks cover the chain (missing parents, cycles), sizes, whether extents can be trusted,
    every seal and presence file, and the sha256 that each snapshot records of its parent
    (parent_content_hash). Everything is read again, even if it was verified before. A parent whose
    hash is not recorded is listed as unpinned; that is not a fault. The exit code is 0 if there is
    no fault, otherwise 1.

    Correct results are remembered, so that `diffmergefs mount` does not need to read the files.

    \b
    Examples:
      diffmergefs verify /srv/snapshots/pandas
      diffmergefs verify /srv/snapshots
      diffmergefs verify --json /srv/snapshots/pandas | jq -r '.faults[].message'
      diffmergefs verify --base mem_file --diff mem_diff
    """
    if source.base is not None and (layout or suffix):
        raise click.UsageError("--layout and --suffix go with SOURCE, not with --base and --diff")
    catalog = None
    with progress("open", unit=""):
        if source.base is not None:
            opened = verification.open_layers(source.base, source.diffs, source.policy)
        elif catalog := find_store(source.image or "", layout, suffix, source.policy):
            opened = verification.open_store(catalog, source.policy)
        else:
            opened = verification.open_image(source.image or "", source.policy)
    with opened, progress("verify", opened.total_bytes) as advance:
        verdicts = opened.verify_all(advance, jobs)
    found = verdicts.values()
    print_diagnostic(*dict.fromkeys(line for v in found for line in (*v.overridden, *v.hints)))
    is_sound = all(verdict.sound for verdict in found)
    if as_json:
        facts = [{"tag": tag, **verdict.as_dict()} for tag, verdict in verdicts.items()]
        print_json(facts if catalog else next(iter(found)).as_dict())
    else:
        for line in _lines(verdicts) if catalog else _lines_of_image(next(iter(found))):
            click.echo(printable(line))
    return 0 if is_sound else 1


def _lines(verdicts: Mapping[str, Verdict]) -> Iterator[str]:
    told: dict[str, str] = {}
    for tag, verdict in verdicts.items():
        faults = _faults(verdict)
        if news := [fault for fault in faults if told.setdefault(fault, tag) == tag]:
            yield from (f"{tag}: {fault}" for fault in news)
        elif faults:
            yield f"{tag}: not sound, because '{told[faults[0]]}' is not"
        else:
            own = verdict.layers[-1]
            pin = ", unpinned" if own.pin == "unpinned" else ""
            layers = counted(len(verdict.layers), "layer")
            yield f"{tag}: sound, {layers} of {sized(own.size or 0, 'bytes')}{pin}"
    sound = sum(verdict.sound for verdict in verdicts.values())
    yield f"{counted(len(verdicts), 'snapshot')}: {sound} sound, {len(verdicts) - sound} not"


def _lines_of_image(verdict: Verdict) -> list[str]:
    return _summary(verdict) if verdict.sound else _faults(verdict)


def _faults(verdict: Verdict) -> list[str]:
    return [" ".join(fault.message.split()) for fault in verdict.faults]


def _summary(verdict: Verdict) -> list[str]:
    pins = sum(layer.pin == "verified" for layer in verdict.layers)
    size = verdict.layers[0].size
    lines = [
        f"sound: {counted(len(verdict.layers), 'layer')} of {sized(size or 0, 'bytes')};"
        f" pins verified: {pins}"
    ]
    children = [layer.tag or "" for layer in verdict.layers if layer.pin == "unpinned"]
    if children:
        named = ", ".join(children[:_NAMED])
        more = f" and {len(children) - _NAMED} more" if len(children) > _NAMED else ""
        lines.append(f"unpinned: no hash of their parents is recorded in {named}{more}")
    return lines
