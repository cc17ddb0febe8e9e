"""Interpreters that we start run our code, whatever stands in the current directory (law 9)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffmergefs.core import interpreter
from tests.support.subjects.interpreter import plant


def test_python_m_leaves_the_current_directory_alone_once_it_runs(tmp_path: Path) -> None:
    """Up to there it is Python's own doing, and a module of that name would be run by it."""
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\n"
    for name in ("trio", "pyfuse3", "click"):
        (tmp_path / f"{name}.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "diffmergefs", "doctor"],
        cwd=tmp_path,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode in (0, 1) and not ran.exists()


def answer_of(code: str) -> str:
    child = interpreter.start_code(code, stdout=subprocess.PIPE)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    return out.decode()


@pytest.mark.parametrize("user", [0, 1000])
def test_what_this_process_finds_is_found_and_nothing_else(
    user: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with PYTHONPATH, `pip install --user` or a checkout."""
    ran = plant(tmp_path / "here")
    (tmp_path / "hé 're").mkdir()
    (tmp_path / "hé 're" / "only_here.py").write_text("word = 'found'\n")
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", ["", ".", "here", str(tmp_path / "hé 're"), *sys.path])
    assert answer_of("import only_here, trio, json; print(only_here.word, end='')") == "found"
    shown = answer_of("import os; print(os.getcwd(), all(map(os.path.isabs, sys.path)))")
    assert shown == "/ True\n"
    assert not ran.exists()


def test_roots_interpreter_heeds_no_variable_of_pythons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = plant(tmp_path / "there")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "there"))
    assert answer_of("print(sys.flags.isolated, sys.argv)") == "1 ['-c']\n"
    assert not ran.exists()
