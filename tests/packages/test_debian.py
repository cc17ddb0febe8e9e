"""The Debian package, in fresh systems of Debian 12 and 13: installed, used, upgraded, purged."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from diffmergefs.cli.helper import NAME as HELPER
from diffmergefs.core import __version__
from diffmergefs.core.errors import MissingExtraError, OutputRefusedError
from tests.support.debian import SUITES, System, base, files, system
from tests.support.images import overlay_oracle
from tests.support.places import DOCS, REPOSITORY
from tests.support.stores import BASE_PAGES, SIZE, pages, write_chain
from tests.support.terminals import SET_UP, STARTS, shell_on_a_terminal
from tests.support.users import NOBODY

# Making a system takes minutes, once.
pytestmark = pytest.mark.timeout(900)

LEAF = overlay_oracle(SIZE, [pages(0, BASE_PAGES), pages(1, [1])])
COMPLETED = {
    "diffmergefs fla": "diffmergefs flatten ",
    "diffmergefs mount --allow-ot": "diffmergefs mount --allow-other ",
}


@pytest.fixture(scope="session")
def package() -> Path:
    """The package of this checkout."""
    subprocess.run(["make", "--no-print-directory", "deb"], cwd=REPOSITORY, check=True, timeout=300)
    return REPOSITORY / "build" / f"diffmergefs_{__version__}_all.deb"


def field(package: Path, name: str) -> str:
    command: list[str | Path] = ["dpkg-deb", "--field", package, name]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="session")
def bases(package: Path) -> Iterator[dict[str, Future[Path]]]:
    """The fresh systems, made side by side."""
    with ThreadPoolExecutor() as pool:
        yield {suite: pool.submit(base, suite, field(package, "Depends")) for suite in SUITES}


@pytest.fixture(scope="module", params=SUITES)
def fresh(request: pytest.FixtureRequest, bases: dict[str, Future[Path]]) -> Path:
    """The directory of a fresh system. The tests of one suite come together."""
    return bases[request.param].result()


@pytest.fixture(scope="module")
def debian(
    fresh: Path, package: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[System]:
    """A system in which a user has installed the package, with a chain of snapshots."""
    with system(fresh, tmp_path_factory.mktemp("debian")) as found:
        found.install(package)
        write_store(found)
        yield found


def write_store(debian: System) -> None:
    # Elsewhere than in /mnt: what is not installed is not compared after a purge.
    write_chain(debian.path / "srv/snapshots", ["base", "leaf"])
    (debian.path / "srv/views").mkdir()


@pytest.fixture
def copy(debian: System, tmp_path: Path) -> Iterator[System]:
    """That system for one test, which may change it."""
    with system(debian.path, tmp_path) as found:
        write_store(found)
        yield found


# (a) What is in it


def test_lintian_finds_no_fault(package: Path) -> None:
    command: list[str | Path] = ["lintian", "--allow-root", "--fail-on", "error,warning", package]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, ""), done


def test_it_depends_on_what_the_project_does(package: Path) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {"fuse3", f"python3 ({project['requires-python'].replace('>=', '>= ')})"}
    for requirement in project["dependencies"]:
        name, *_ = re.split("[<>=]", requirement)
        for sign, version in re.findall(r"(>=|<)([\d.]+)", requirement):
            wanted.add(f"python3-{name} ({sign.replace('<', '<<')} {version})")
    assert set(field(package, "Depends").split(", ")) - {"python3:any"} == wanted


def test_it_brings_no_compiler_and_no_pip(debian: System) -> None:
    names = debian.run("dpkg-query", "--show", "--showformat=${Package}\n").split()
    assert {"python3-pyfuse3", "python3-trio", "fuse3"} <= set(names)
    assert not [name for name in names if re.fullmatch(r"gcc(-\d+)?|python3-pip|.*-dev", name)]
    assert debian.run("dpkg", "--verify", "diffmergefs") == ""
    assert debian.run("dpkg", "--audit") == ""


def test_every_page_is_a_manual_or_a_document(debian: System) -> None:
    names = set(debian.run("dpkg", "--listfiles", "diffmergefs").split())
    folder = "/usr/share/doc/diffmergefs"
    assert {f"{folder}/{page.name}" for page in DOCS.glob("*.md")} <= names
    assert {f"{folder}/copyright", f"{folder}/changelog.gz"} <= names
    for page in [*DOCS.glob("diffmergefs*.md"), DOCS / f"{HELPER}.md"]:
        text = debian.run("man", "-P", "cat", page.stem)
        assert text.upper().startswith(f"{page.stem.upper()}(") and "SEE ALSO" in text
    assert "mount(8) helper" in debian.run("whatis", HELPER)


# (b) What it does


@pytest.mark.parametrize("shell", STARTS)
def test_a_tabulator_completes(shell: str, debian: System) -> None:
    set_up = SET_UP[shell]
    if shell == "bash":  # as the file .bashrc of Debian does it
        set_up += "; . /usr/share/bash-completion/bash_completion"
    command = [*debian.enter, *STARTS[shell]]
    with shell_on_a_terminal(command, set_up, Path("/"), debian.environment) as terminal:
        for typed, completed in COMPLETED.items():
            terminal.complete(typed, completed)


@pytest.mark.parametrize(("typed", "completed"), COMPLETED.items())
def test_fish_completes(typed: str, completed: str, debian: System) -> None:
    offered = debian.run("fish", "--command", f"complete --do-complete {shlex.quote(typed)}")
    assert completed.split()[-1] in [line.partition("\t")[0] for line in offered.splitlines()]


def test_a_line_of_fstab_is_mounted(copy: System) -> None:
    line = "/srv/snapshots /srv/views fuse.diffmergefs allow_other,nofail 0 0\n"
    (copy.path / "etc/fstab").write_text(line)
    copy.run("mount", "/srv/views")
    hexadecimal = copy.run("od", "-An", "-v", "-tx1", "/srv/views/leaf/memory.bin", user=NOBODY)
    assert bytes.fromhex(hexadecimal) == LEAF
    assert copy.run("findmnt", "-no", "FSTYPE", "/srv/views") == "fuse.diffmergefs\n"
    copy.run("umount", "/srv/views")
    assert copy.call("findmnt", "/srv/views").returncode == 1


@pytest.mark.parametrize("user", [0, NOBODY])
def test_the_demo_runs(user: int, debian: System) -> None:
    assert "unmounted" in debian.run("diffmergefs", "demo", user=user).splitlines()[-1]


def test_doctor_is_content(debian: System) -> None:
    assert "pyfuse3" in debian.run("diffmergefs", "doctor", "/srv/snapshots")


def test_a_users_own_modules_do_not_change_it(copy: System) -> None:
    (copy.path / "srv/click.py").write_text("raise SystemExit('another click')\n")
    printed = copy.run("diffmergefs", "--version", PYTHONPATH="/srv")
    assert printed.strip().endswith(__version__)


def test_what_is_missing_is_named_by_debians_name(debian: System) -> None:
    done = debian.call("diffmergefs", "map", "/srv/snapshots/leaf", "-o", "/srv/map.png")
    assert done.returncode == MissingExtraError.exit_code
    assert done.stderr.endswith("; install it: apt install python3-matplotlib\n")
    done = debian.call("diffmergefs", "install-extras")
    assert done.returncode == OutputRefusedError.exit_code


def test_the_unit_is_right_and_not_enabled(copy: System) -> None:
    unit = "diffmergefs@views.service"
    (copy.path / "etc/diffmergefs/views.conf").write_text("SOURCE=/srv\nMOUNTPOINT=/mnt\n")
    done = copy.call("systemd-analyze", "verify", unit)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert copy.call("systemctl", "is-enabled", unit).stdout == "disabled\n"
    text = (copy.path / "usr/lib/systemd/system/diffmergefs@.service").read_text()
    assert "\nExecStart=/usr/bin/diffmergefs mount -f" in text


# (c) How it goes


@contextmanager
def mounted(debian: System) -> Iterator[None]:
    debian.run("diffmergefs", "mount", "/srv/snapshots", "/srv/views")
    try:
        yield
    finally:
        debian.call("umount", "--lazy", "/srv/views")


def older(package: Path, folder: Path) -> Path:
    """The package as version 0.0.1, with a page and a module that the newer one lacks."""
    subprocess.run(["dpkg-deb", "--raw-extract", package, folder / "old"], check=True)
    control = folder / "old/DEBIAN/control"
    text = control.read_text(encoding="utf-8").replace(
        f"\nVersion: {__version__}", "\nVersion: 0.0.1"
    )
    control.write_text(text, encoding="utf-8")
    for name in ("share/doc/diffmergefs/gone.md", "lib/python3/dist-packages/diffmergefs/gone.py"):
        (folder / "old/usr" / name).touch()
    made = folder / "diffmergefs_0.0.1_all.deb"
    build: list[str | Path] = ["dpkg-deb", "--root-owner-group", "--build", folder / "old", made]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    return made


def test_an_upgrade_keeps_settings_and_a_mount_goes_on(
    copy: System, package: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    version = ("dpkg-query", "--show", "--showformat=${Version}", "diffmergefs")
    copy.install(older(package, tmp_path_factory.mktemp("older")), "--allow-downgrades")
    assert copy.run(*version) == "0.0.1"
    settings = copy.path / "etc/default/diffmergefs"
    settings.write_text("OPTIONS=--allow-other\n")
    with mounted(copy):
        copy.install(package)
        assert copy.run(*version) == __version__
        image = copy.path / "srv/views/leaf/memory.bin"
        assert image.read_bytes() == LEAF
        assert "diffmergefs_open_images" in copy.run("cat", "/srv/views/.diffmergefs/metrics")
        copy.run("diffmergefs", "status", "/srv/views")
        copy.run("diffmergefs", "umount", "/srv/views")
    assert settings.read_text() == "OPTIONS=--allow-other\n"
    assert not [name for name in files(copy.path) if re.search(r"diffmergefs/.*gone", name)]
    assert copy.run("dpkg", "--audit") == ""


def test_a_purge_leaves_nothing(copy: System, fresh: Path) -> None:
    copy.run("diffmergefs", "seal", "/srv/snapshots/leaf/memory.bin")
    with mounted(copy):
        copy.run("cat", "/srv/views/leaf/memory.bin")
        copy.run("diffmergefs", "umount", "/srv/views")
    assert (copy.path / "var/lib/diffmergefs").exists()
    copy.run("apt", "purge", "--yes", "--autoremove", "diffmergefs")
    before, after = files(fresh), files(copy.path)
    names = before.keys() | after.keys()
    assert sorted(name for name in names if before.get(name) != after.get(name)) == []
