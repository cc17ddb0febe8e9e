"""Which coreutils this machine has: what they do with holes differs from version to version."""

from __future__ import annotations

import re
import subprocess


def coreutils() -> tuple[int, ...]:
    """Their version, such as (9, 1)."""
    text = subprocess.run(["cp", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.match(r"cp \(GNU coreutils\) (\d+)\.(\d+)", text)
    assert found is not None, text
    return tuple(map(int, found.groups()))
