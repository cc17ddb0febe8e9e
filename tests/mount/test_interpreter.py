"""Commands that open the FUSE device import nothing from the current directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import skips
from tests.support.subjects.children import plant

SCRIPT = "import sys\nfrom diffmergefs.cli import main\nsys.exit(main())\n"


@pytest.mark.parametrize("verb", ["doctor", "demo"])
def test_nothing_of_the_current_directory_is_run(verb: str, tmp_path: Path) -> None:
    skips.require_fuse()
    ran = plant(tmp_path / "here")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), verb],
        cwd=tmp_path / "here",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not ran.exists()
    assert done.returncode == 0, done
    assert "pyfuse3 3." in done.stdout or verb == "demo"
