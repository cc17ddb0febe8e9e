"""Where the tests of remembered results keep them."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffmergefs.core.identity import FileVersion
from diffmergefs.sidecars.verified import Identity, Remembered

CTIME_NS = 1_600_000_000_500

VERSION = FileVersion(7, 2**63 + 5, 4096, 1_600_000_000_000_000_001, CTIME_NS)

OLD = Identity("/images/base.mem", VERSION)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "state"


def memory(directory: Path) -> Remembered:
    return Remembered(str(directory))
