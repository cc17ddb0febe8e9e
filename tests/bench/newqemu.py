"""A QEMU that maps a memory file read-only (8.2 or newer): the system's, or one from backports.

Debian 12's own is 7.2. The newer one is downloaded by apt from the backports of the very archive
that the system is set up with, and unpacked into `.cache/`: neither the system's packages nor its
package lists are touched.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from functools import cache
from pathlib import Path

from tests.bench.measure import MIB, NotMeasured, say
from tests.bench.programs import need, run
from tests.vm import qemu
from tests.vm.guest import GuestUnavailableError

READ_ONLY_SINCE = (8, 2)

_CACHE = Path(__file__).parents[2] / ".cache" / "qemu"
_PACKAGES = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")
_FIRMWARE = ("usr/share/qemu", "usr/share/seabios")


def machine(mebibytes: int) -> qemu.Machine:
    """A machine of so much memory under a QEMU that maps read-only, or else the system's.

    NotMeasured where there is none at all.
    """
    program, firmware = _found()
    return qemu.Machine(mebibytes * MIB, program, firmware)


@cache
def _found() -> tuple[str, tuple[str, ...]]:
    system = qemu.Machine().program
    try:
        if qemu.version() >= READ_ONLY_SINCE:
            return system, ()
    except GuestUnavailableError:
        pass
    unpacked = _CACHE / "root"
    program = unpacked / "usr/bin" / system
    try:
        if not program.exists():
            _fetch(unpacked)
        if qemu.version(str(program)) >= READ_ONLY_SINCE:
            firmware = [str(unpacked / path) for path in _FIRMWARE]
            return str(program), (*firmware, *(f"/{path}" for path in _FIRMWARE))
    except (NotMeasured, GuestUnavailableError) as error:
        say(f"    no newer QEMU: {error}")
    return need(system), ()


def _fetch(target: Path) -> None:
    say("    fetching a newer QEMU from backports into .cache")
    _CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_CACHE) as name:
        place = Path(name)
        for folder in ("lists/partial", "archives/partial", "root"):
            (place / folder).mkdir(parents=True)
        source = place / "backports.list"
        source.write_text(_source(), encoding="ascii")
        options = {
            "Dir::Etc::SourceList": source,
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::State::Lists": place / "lists",
            "Dir::Cache": place,
            "APT::Sandbox::User": "root",
        }
        apt = ["apt-get", "-q", *(w for k, v in options.items() for w in ("-o", f"{k}={v}"))]
        run([*apt, "update"])
        suite = f"{_codename()}-backports"
        script = 'cd "$0" && exec "$@"'
        run(["sh", "-c", script, name, *apt, "download", *(f"{p}/{suite}" for p in _PACKAGES)])
        for package in place.glob("*.deb"):
            run(["dpkg-deb", "-x", package, place / "root"])
        shutil.rmtree(target, ignore_errors=True)
        (place / "root").rename(target)


def _source() -> str:
    # The archive that holds the system's own release.
    wanted = f"{_codename()}|main"
    targets = run(["apt-get", "indextargets", "--format", "$(RELEASE)|$(COMPONENT)|$(REPO_URI)"])
    found = [line.removeprefix(f"{wanted}|") for line in targets.splitlines() if wanted in line]
    if not found:
        raise NotMeasured("apt knows no archive of this release")
    return f"deb {found[0]} {_codename()}-backports main\n"


def _codename() -> str:
    text = Path("/etc/os-release").read_text(encoding="utf-8")
    match = re.search(r"^VERSION_CODENAME=(\w+)$", text, re.MULTILINE)
    if match is None or shutil.which("apt-get") is None:
        raise NotMeasured("not a Debian system")
    return match[1]
