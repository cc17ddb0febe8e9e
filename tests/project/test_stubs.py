"""The stub of pyfuse3 that mypy reads agrees with the pyfuse3 that is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.places import REPOSITORY


def test_the_stub_of_pyfuse3_agrees_with_what_is_installed(tmp_path: Path) -> None:
    settings = tmp_path / "mypy.ini"
    settings.write_text(f"[mypy]\nmypy_path = {REPOSITORY}/tests/stubs\n")
    command = [sys.executable, "-m", "mypy.stubtest", "--concise", "--ignore-missing-stub"]
    command += ["--mypy-config-file", str(settings), "pyfuse3"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path
    )
    # Cython's classes are disjoint bases, which only a newer typing_extensions can express.
    wrong = [line for line in done.stdout.splitlines() if "disjoint base" not in line]
    assert (wrong, done.stderr) == ([], "")
