"""What `make soak` adds to pytest: full counts, and the page of what was seen."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.places import REPOSITORY
from tests.support.soak import SHARE, counter, teller

CONFTEST = """
from pathlib import Path
import pytest
from tests.support import soak

def pytest_configure(config):
    config.pluginmanager.register(soak.Record(Path("docs/page.md"), full=True))

@pytest.fixture
def seen(record_property):
    return soak.teller(record_property)
"""
TESTS = '''
"""A group."""
import pytest

def test_that_tells(seen):
    """Something happens often."""
    seen(kills=12345, longest_ms=20, left={"b": 1, "a": 2})

def test_another(seen):
    seen(kills=5, longest_ms=9, rounds=1)

@pytest.mark.parametrize("n", [1, 2, 3])
def test_that_is_quiet(n):
    assert n != 3

@pytest.mark.parametrize("full", [20000, 5000], ids=["bytes", "values"])
def test_fuzzed_things(full):
    pass

@pytest.fixture
def broken():
    raise RuntimeError

@pytest.fixture
def unclean():
    yield
    raise RuntimeError

def test_with_a_bad_end(unclean, seen):
    seen(kills=1)

def test_that_is_left_out():
    pass

def test_with_a_broken_fixture(broken):
    pass
'''


def test_the_count_is_full_or_a_share() -> None:
    assert [counter(True)(n) for n in (1, 5, 200)] == [1, 5, 200]
    assert [counter(False)(n) for n in (1, 5, 200)] == [1, 1, 200 // SHARE]
    assert SHARE >= 10


def test_numbers_are_noted_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    noted: list[tuple[str, object]] = []
    teller(lambda *pair: noted.append(pair))(reads_right=1234567, ends={"well": 3}, none={})
    assert noted == [("seen", {"reads_right": 1234567, "ends": {"well": 3}, "none": {}})]
    assert capsys.readouterr().out == "reads right: 1,234,567; ends: well 3; none: none\n"


def test_the_page(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST, encoding="utf-8")
    (tmp_path / "test_it.py").write_text(TESTS, encoding="utf-8")
    options = ["-q", "-c", os.devnull, "--rootdir", str(tmp_path), "-k", "not left_out"]
    command = [sys.executable, "-m", "pytest", *options]
    done = subprocess.run(
        [*command, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 1, done
    page = (tmp_path / "docs" / "page.md").read_text(encoding="utf-8")
    assert ": 6 of 10 tests passed." in page
    assert f"| processors | {os.cpu_count()} |" in page
    rows = page[page.index("## A group") :].splitlines()[4:]
    assert rows == [
        "| Something happens often |  | kills: 12,345; longest ms: 20; left: a 2, b 1 | passed |",
        "| another |  | kills: 5; longest ms: 9; rounds: 1 | passed |",
        "| that is quiet | 2 cases |  | passed |",
        "| that is quiet | 3 |  | failed |",
        "| fuzzed things | bytes | inputs: 20,000 | passed |",
        "| fuzzed things | values | inputs: 5,000 | passed |",
        "| with a bad end |  | kills: 1 | failed |",
        "| with a broken fixture |  |  | failed |",
        "",
        "Together: kills: 12,351; longest ms: 20; inputs: 25,000.",
    ]
    assert socket.gethostname() not in page and str(tmp_path) not in page and "/root" not in page
