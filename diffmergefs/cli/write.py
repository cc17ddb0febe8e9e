"""`flatten`, `squash` and `apply`: merge an image or some diffs into a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict

import click

from diffmergefs.cli.inputs import ImageArguments, image_options
from diffmergefs.cli.options import (
    PATH,
    F,
    json_option,
    output_options,
    strict_option,
    trust_options,
)
from diffmergefs.cli.output import (
    print_diagnostic,
    print_json,
    print_table,
    printable,
    progress,
    sized,
)
from diffmergefs.cli.usage import Verb
from diffmergefs.core.errors import DiffMergeError, counted
from diffmergefs.opening.images import Image
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.stores.lookup import find_image
from diffmergefs.system.mountpoint import require_answer
from diffmergefs.writing.apply import REASONS, apply_diff
from diffmergefs.writing.diffs import count_data
from diffmergefs.writing.diffs import squash as squash_view
from diffmergefs.writing.flatten import flatten as flatten_view
from diffmergefs.writing.newdiff import WrittenDiff

_NAMED = 8  # how many tags of a chain a message names


@click.command(cls=Verb)
@image_options
@strict_option
@output_options("The new image file.", verify="Read it back and compare before publishing it.")
@json_option
def flatten(source: ImageArguments, output: str, as_json: bool, **how: bool) -> None:
    """Write IMAGE to a new standalone sparse file, which appears complete or not at all.

    If the filesystem can reflink, blocks are shared with the layers; otherwise they are copied.

    \b
    Examples:
      diffmergefs flatten /srv/snapshots/pandas -o pandas.mem
      diffmergefs flatten --base mem_file --diff mem_diff -o whole.mem --verify
    """
    with source.open().view as view:
        with progress("flatten", sum(view.visible_bytes())) as advance:
            result = flatten_view(view, output, progress=advance, **how)
        paths = [layer.path for layer in view.layers]
    rows = list(zip(paths, result.copied, result.shared, strict=True))
    if as_json:
        layers = [{"path": p, "copied": c, "shared": s} for p, c, s in rows]
        print_json({"output": output, "size": result.size, "holes": result.holes, "layers": layers})
        return
    print_table(("LAYER", "=COPIED", "=SHARED"), rows)
    click.echo(
        f"{printable(output)}: {sized(result.size, 'bytes')}, {sized(sum(result.copied))} copied,"
        f" {sized(sum(result.shared))} shared, {sized(result.holes)} in holes{_done(how)}"
    )


def _complete_tags(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[str]:
    # Of the diffs of the chain of IMAGE, if it is named already. (While an option lacks its value,
    # click has not yet assigned the arguments.)
    image = context.params.get("image") or next(iter(context.args), "")
    try:
        require_answer(image)
        policy = TrustPolicy(allow_gaps=bool(context.params.get("allow_gaps")))
        catalog, tag = find_image(image, policy)
        return [t for link in catalog.chain(tag)[1:] if (t := link.tag).startswith(incomplete)]
    except (DiffMergeError, OSError):
        return []


def _tag_option(name: str, text: str) -> Callable[[F], F]:
    return click.option(
        name, f"{name[2:]}_tag", metavar="TAG", shell_complete=_complete_tags, help=text
    )


@click.command(cls=Verb)
@image_options
@output_options("The new diff.", verify="Compare the chain that uses it before publishing it.")
@_tag_option("--from", "The oldest diff (default: the first).")
@_tag_option("--to", "The newest diff (default: IMAGE's own).")
@json_option
def squash(
    source: ImageArguments,
    output: str,
    from_tag: str | None,
    to_tag: str | None,
    as_json: bool,
    **how: bool,
) -> None:
    """Merge diffs of IMAGE's chain into one that can replace them. The base is not read.

    Without --from and --to, all diffs are merged; the two diffs that they name are included.
    Written zeros stay data. The output appears complete or not at all, after a check that it has
    data exactly where one of the diffs has data. If the filesystem can reflink, blocks are shared.

    \b
    Examples:
      diffmergefs squash /srv/snapshots/pandas -o squashed.diff
      diffmergefs squash /srv/layers/002-pandas.mem --from numpy --to pandas -o squashed.diff
      diffmergefs squash --base mem_file --diff mem_diff -o squashed.diff --seal --verify
    """
    if source.base is not None and (from_tag is not None or to_tag is not None):
        raise click.UsageError(
            "--from and --to need IMAGE; with --base and --diff, name only the diffs to squash"
        )
    with (found := source.open()).view as view:
        if len(view.layers) == 1:
            raise click.UsageError(f"{view.layers[0].path} is a base: it has no diff to squash")
        first = 1 if from_tag is None else _position(found, from_tag, "--from")
        last = len(view.layers) - 1 if to_tag is None else _position(found, to_tag, "--to")
        if first > last:
            raise click.UsageError(
                f"--from {found.tags[first]} is newer than --to {found.tags[last]} in the chain"
                f" {_named(found)}"
            )
        with progress("squash", count_data(view, first, last)) as advance:
            result = squash_view(
                view,
                output,
                first=first,
                last=last,
                policy=source.policy,
                progress=advance,
                **how,
            )
        paths = [layer.path for layer in view.layers[first : last + 1]]
    facts = {"shadowed_bytes": result.shadowed_bytes, "layers": paths}
    written = result.written
    text = f"{counted(len(paths), 'diff')} as one; {sized(written.data_bytes, 'bytes')} of data in"
    text += f" {counted(written.extents, 'extent')}, {sized(written.copied)} copied,"
    text += f" {sized(written.shared)} shared, {sized(result.shadowed_bytes)} shadowed"
    report_diff(output, written, facts, text, as_json, how)


def _position(found: Image, tag: str, option: str) -> int:
    if tag not in found.tags:
        raise click.UsageError(f"{option} {tag} is not a tag of the chain {_named(found)}")
    if found.tags[0] == tag:
        raise click.UsageError(
            f"{option} {tag} is the base of the chain {_named(found)}; name a diff"
        )
    return found.tags.index(tag)


def _named(found: Image) -> str:
    tags = [printable(tag) for tag in found.tags]
    if len(tags) > _NAMED:
        tags = [*tags[: _NAMED // 2], "...", *tags[-_NAMED // 2 :]]
    return ", ".join(tags)


def report_diff(
    output: str,
    written: WrittenDiff,
    facts: Mapping[str, object],
    text: str,
    as_json: bool,
    how: Mapping[str, bool],
) -> None:
    """Print that a diff was written to `output`, with the verb's own `facts` or `text`.

    `how` has the values of `output_options`.
    """
    print_diagnostic(*written.overridden)
    if written.dense:
        print_diagnostic(f"{output}: the diff has no holes and needs --dense")
    if as_json:
        print_json({"output": output, **asdict(written), **facts})
    else:
        click.echo(f"{printable(output)}: {text}{_done(how)}")


def _done(how: Mapping[str, bool]) -> str:
    return f"{', verified' if how['verify'] else ''}{', sealed' if how['seal'] else ''}"


def _reasons(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> frozenset[str]:
    names = frozenset(value.split(",") if value is not None else ())
    if unknown := names - set(REASONS):
        named = ", ".join(sorted(unknown))
        raise click.BadParameter(f"{named!r} is not among {', '.join(REASONS)}")
    return names


@click.command(cls=Verb)
@click.argument("diff", type=PATH)
@click.argument("base", type=PATH)
@click.option("--sync", is_flag=True, help="fsync BASE at the end.")
@click.option(
    "--force",
    callback=_reasons,
    metavar="NAME[,NAME...]",
    help="Overwrite BASE although it has a seal, which is removed (sealed), is a layer of a store"
    " (layer), has other names (links), is open elsewhere (open), is used by a mount (mounted), or"
    " DIFF covers nearly all of its data (order).",
)
@json_option
@trust_options
def apply(
    diff: str,
    base: str,
    sync: bool,
    force: frozenset[str],
    as_json: bool,
    policy: TrustPolicy,
) -> None:
    """Merge DIFF into BASE: copy its data extents to BASE, in place.

    BASE is changed, so give a copy that you own. It is refused if something depends on it, or if
    the two files look swapped. Both must have the same size. You can repeat an interrupted apply.
    Print the number of bytes copied.

    \b
    Example:
      cp --reflink=auto mem_file whole.mem && diffmergefs apply mem_diff whole.mem
    """
    with progress("apply") as advance:
        copied = apply_diff(diff, base, sync=sync, policy=policy, force=force, progress=advance)
    if as_json:
        print_json({"base": base, "copied": copied})
    else:
        click.echo(f"{sized(copied, 'bytes')} copied")
