"""What `doctor` has to say: one finding each, with the reason why it matters and what helps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["fine", "warning", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `subject` is 'host' or a path, `check` a word for programs.

    'wrong' is what would give wrong bytes, or none, if nothing refused it; a 'warning' is anything
    else that is better mended. Only what is 'fine' has no `why` and no `remedy`.
    """

    subject: str
    check: str
    severity: Severity
    finding: str
    why: str = ""
    remedy: str = ""
