"""How diffmergefs was installed, and what that says about packages that are missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from diffmergefs.cli import helper
from diffmergefs.system import installation
from diffmergefs.system.installation import PACKAGED, install_command, missing_package


def test_a_missing_package_is_installed_for_the_running_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/my tools/bin/python3")
    start = "'/opt/my tools/bin/python3' -m pip install"
    assert install_command("matplotlib") == f"{start} matplotlib"
    assert install_command("pyfuse3").startswith(f"{start} pyfuse3 (which needs gcc, ")


def test_a_package_of_the_distribution_names_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not installation.is_packaged()
    monkeypatch.setattr(installation, "__file__", f"{PACKAGED}/diffmergefs/system/x.py")
    assert installation.is_packaged()
    assert install_command("prometheus_client") == "apt install python3-prometheus-client"
    assert install_command("pyfuse3") == "apt install python3-pyfuse3"


@pytest.mark.parametrize(
    ("error", "package"),
    [
        (ModuleNotFoundError("", name="rich.table"), "rich"),
        (ModuleNotFoundError("", name="diffmergefs.nothing"), None),
        (ModuleNotFoundError("", name="sqlite3.dump"), None),
        (ModuleNotFoundError(""), None),
        (ImportError("", name="pyfuse3"), None),
        (ValueError(), None),
    ],
)
def test_an_error_names_the_package_that_is_missing(error: Exception, package: str | None) -> None:
    assert missing_package(error) == package


def test_the_files_of_this_installation_are_found() -> None:
    programs = {path.name for path in installation.installed_files() if path.parent.name == "bin"}
    assert programs == {"diffmergefs", helper.NAME}
    assert all(path.is_absolute() and ".." not in path.parts for path in installed())
    assert all(path.exists() for path in installed() if path.parent.name == "bin")


def installed() -> list[Path]:
    return installation.installed_files()
