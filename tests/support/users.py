"""Commands run as somebody else."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Any

from tests.support import skips

#: A uid and gid of nobody's, and another that no account has.
NOBODY = 65534
STRANGER = 12345


def run_as(
    uid: int, gid: int, argv: Sequence[str], **options: Any
) -> subprocess.CompletedProcess[Any]:
    """Run the command as this user and group, without any further groups.

    The options are those of `subprocess.run`; unless told otherwise the output
    is captured as bytes, the directory is / and the limit 60 seconds. Use the
    system's programs (/bin/cat, /usr/bin/stat): another user may not be able to
    read the virtual environment. Skips the test unless it runs as root.
    """
    skips.require_root()
    settings: dict[str, Any] = {"check": False, "cwd": "/", "timeout": 60} | options
    if not settings.keys() & {"stdout", "stderr"}:
        settings.setdefault("capture_output", True)
    result: subprocess.CompletedProcess[Any] = subprocess.run(
        argv, user=uid, group=gid, extra_groups=[], **settings
    )
    return result
