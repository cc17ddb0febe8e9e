"""Fresh Debian systems in directories: made by debootstrap once, then used copy-on-write."""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import mounttable, skips
from tests.support.places import REPOSITORY

SUITES = ["bookworm", "trixie"]

_MIRROR = "http://deb.debian.org/debian"
# What a user's machine has besides the smallest system.
_PROGRAMS = ["adduser", "bash-completion", "fish", "man-db", "systemd", "zsh"]
_BASES = REPOSITORY / "build" / "packages"
_ANSWER_SECONDS = 30
_SECONDS = 600
# Filesystems of their own, for what is not installed. (diffmergefs does not trust the holes of an
# overlay over a tmpfs.)
_OWN = ("run", "srv", "tmp")
_MOUNTED = (*_OWN, "dev", "proc", "sys")
# What the package tools remember of a package that is gone, and what can be made again.
_TOOLS_OWN = re.compile(
    r"var/(cache|log)/|var/lib/apt/|var/lib/dpkg/(status|diversions|statoverride|available|lock|.*-old$)"
)


def base(suite: str, depends: str) -> Path:
    """The directory of a fresh system; nothing may be written there.

    Its package cache holds what is needed to install packages with these dependencies. It is kept,
    and made anew each month. Skips the test if it may not be made, or if no mirror answers.
    """
    skips.require_mounts()
    made_of = f"{depends}{_PROGRAMS}{inspect.getsource(base)}"
    key = hashlib.sha256(made_of.encode()).hexdigest()[:8]
    path = _BASES / f"{suite}-{time.strftime('%Y-%m')}-{key}"
    if path.exists():
        return path
    mirror = _mirror_of_this_machine()
    _require_answer(f"{mirror}/dists/{suite}/Release")
    _BASES.mkdir(parents=True, exist_ok=True)
    for old in _BASES.glob(f"{suite}-*"):
        mounttable.unmount_below(str(old))
        shutil.rmtree(old)
    new = _BASES / f"{suite}-new"
    make = ["debootstrap", "--variant=minbase", f"--include={','.join(_PROGRAMS)}"]
    _run([*make, suite, str(new), mirror])
    (new / "etc/apt/apt.conf.d/90this-machine").write_text(_settings_of_apt(), encoding="utf-8")
    for command in (["update"], ["satisfy", "--download-only", "--yes", depends]):
        _run(["chroot", str(new), "apt-get", *command], _environment())
    new.rename(path)
    return path


def _run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=environment,
        timeout=_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}"
    return done.stdout


def _mirror_of_this_machine() -> str:
    if not shutil.which("apt-get"):
        return _MIRROR
    form = "$(ORIGIN) $(REPO_URI) $(CODENAME)"
    for line in _run(["apt-get", "indextargets", "--format", form]).splitlines():
        # bookworm-security and the like lie elsewhere.
        if found := re.fullmatch(r"Debian (http\S+?)/? \w+", line):
            return found[1]
    return _MIRROR


def _settings_of_apt() -> str:
    # Proxies, and whether the dates of indexes count.
    known = _run(["apt-config", "dump"]) if shutil.which("apt-config") else ""
    lines = re.findall(r"^Acquire::(?:https?::|Check-).*$", known, re.MULTILINE)
    return "".join(f"{line}\n" for line in lines)


def _require_answer(url: str) -> None:
    try:
        urllib.request.urlopen(url, timeout=_ANSWER_SECONDS).close()
    except OSError:
        pytest.skip(skips.NO_MIRROR)


def _environment() -> dict[str, str]:
    proxies = {k: v for k, v in os.environ.items() if k.lower().endswith("_proxy")}
    return proxies | {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/tmp",
        "TERM": "dumb",
        "LC_ALL": "C.UTF-8",
        "DEBIAN_FRONTEND": "noninteractive",
    }


@dataclass(frozen=True)
class System:
    """A Debian system in a directory, with /dev/fuse for every user."""

    path: Path

    @property
    def enter(self) -> list[str]:
        """The command that runs the words after it in the system, as root."""
        return ["chroot", str(self.path)]

    @property
    def environment(self) -> dict[str, str]:
        """What such a command has for an environment."""
        return _environment()

    def call(
        self, *command: str, user: int = 0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the command in it as this user, whatever its exit code."""
        if user:
            ids = [f"--reuid={user}", f"--regid={user}", "--clear-groups"]
            command = ("setpriv", *ids, "--", *command)
        return subprocess.run(
            [*self.enter, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=_environment() | environment,
            timeout=_SECONDS,
            check=False,
        )

    def run(self, *command: str, user: int = 0, **environment: str) -> str:
        """What the command prints on stdout; it must succeed."""
        done = self.call(*command, user=user, **environment)
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def install(self, package: Path, *options: str) -> None:
        """`apt install` of this file."""
        shutil.copy(package, self.path / "srv" / package.name)
        self.run("apt", "install", "--yes", *options, f"/srv/{package.name}")
        (self.path / "srv" / package.name).unlink()


def files(root: Path) -> dict[str, bytes]:
    """Every file and directory of a system, with the contents of those in /etc.

    Left out are caches, logs, and the files of apt and dpkg themselves.
    """
    found = {}
    for folder, folders, names in os.walk(root):
        if Path(folder) == root:
            folders[:] = [name for name in folders if name not in _MOUNTED]
        for name in [*folders, *names]:
            path = Path(folder, name)
            relative = str(path.relative_to(root))
            if _TOOLS_OWN.match(relative):
                continue
            is_read = relative.startswith("etc/") and path.is_file() and not path.is_symlink()
            found[relative] = path.read_bytes() if is_read else b""
    return found


@contextmanager
def system(lower: Path, folder: Path) -> Iterator[System]:
    """A system that begins as `lower` is, and leaves it so. Of what is written, nothing stays.

    /srv, /tmp and /run are empty. `folder` is an empty directory. `lower` must not change
    meanwhile; it may be another system.
    """
    skips.require_mounts()
    skips.require_fuse()
    root = folder / "root"
    try:
        _mount("-t", "tmpfs", "none", folder)
        for name in ("root", "upper", "work"):
            (folder / name).mkdir()
        layers = f"lowerdir={lower},upperdir={folder}/upper,workdir={folder}/work"
        _mount("-t", "overlay", "-o", layers, "overlay", root)
        _mount("-t", "proc", "proc", root / "proc")
        _mount("-t", "sysfs", "sysfs", root / "sys")
        _mount("-t", "fusectl", "fusectl", root / "sys/fs/fuse/connections")
        for name in _OWN:
            _mount("-t", "tmpfs", "none", root / name)
        # Of this machine's directories only that of terminals: the scripts of packages run as root.
        _mount("--bind", "/dev/pts", root / "dev/pts")
        (root / "dev/fuse").unlink(missing_ok=True)
        os.mknod(root / "dev/fuse", 0o020666, os.makedev(10, 229))
        (root / "dev/fuse").chmod(0o666)
        yield System(root)
    finally:
        mounttable.unmount_below(str(folder))


def _mount(*arguments: str | Path) -> None:
    _run(["mount", *map(str, arguments)])
