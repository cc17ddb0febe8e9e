"""`doctor`: is this machine, this filesystem, this diff file fit for it?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby

import click

from diffmergefs.checks.doctor import examine_path
from diffmergefs.checks.finding import Finding
from diffmergefs.checks.host import examine_host
from diffmergefs.cli.common import (
    PATH,
    page_size_option,
    print_json,
    printable,
    state_dir_option,
    store_options,
    talk,
    with_policy,
)
from diffmergefs.cli.progress import progress
from diffmergefs.cli.trial import try_mount
from diffmergefs.core.errors import DiffMergeError
from diffmergefs.opening.trust import TrustPolicy

_WRONG = 1


@click.command()
@click.argument("paths", metavar="[PATH...]", nargs=-1, type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@with_policy
@page_size_option
@state_dir_option
@store_options
def doctor(paths: tuple[str, ...], as_json: bool, policy: TrustPolicy) -> int:
    """Say whether this machine, and the filesystem and diffs of each PATH, are fit to be merged.

    PATH is a directory of snapshots, a snapshot, a layer file, or a directory where diffs are to
    be taken. Its filesystem is tried out with a temporary file; each layer is looked at in every
    way that `mount` and `flatten` know. Whatever is not fine has the reason why it matters and a
    remedy. A view is mounted for a moment, where nobody sees it. A fault of one PATH does not keep
    it from the next; only a PATH in a mount of ours that hangs ends it at once. The exit code is 1
    if anything would give wrong bytes, or nothing can be mounted, else 0.

    \b
    Examples:
      diffmergefs doctor
      diffmergefs doctor /srv/snapshots
      diffmergefs doctor --json mem_diff | jq -r '.[] | select(.severity == "wrong").finding'
    """
    findings = [*examine_host(), try_mount()]
    failed = 0
    for path in paths:
        try:
            with progress(f"examine {printable(path)}", unit=""):
                findings += examine_path(path, policy)
        except DiffMergeError as error:
            talk(str(error))
            failed = failed or error.exit_code
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        print("\n".join(_lines(findings)))
    return _WRONG if any(f.severity == "wrong" for f in findings) else failed


def _lines(findings: list[Finding]) -> Iterator[str]:
    for subject, group in groupby(findings, key=lambda finding: finding.subject):
        yield printable(subject)
        for finding in group:
            yield f"  {finding.severity:8} {printable(finding.finding)}"
            if finding.why:
                yield f"{'':11}why: {printable(finding.why)}"
                yield f"{'':11}remedy: {printable(finding.remedy)}"
    counts = {
        severity: sum(finding.severity == severity for finding in findings)
        for severity in ("wrong", "warning", "fine")
    }
    yield ", ".join(f"{count} {severity}" for severity, count in counts.items())
