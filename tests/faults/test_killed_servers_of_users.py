"""Servers of ordinary users die too: through fusermount3, for others, and in a user namespace"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffmergefs.fuse.status import STATUS_FILE, Status
from tests.support import skips
from tests.support.live import until
from tests.support.mounts import server_of
from tests.support.namespaces import Namespace, private_mounts
from tests.support.processes import is_dead, keeper_with, processes_with
from tests.support.restores import ORACLE, write_pair
from tests.support.servers import TOOK_OVER, covered
from tests.support.users import NOBODY, STRANGER

__all__ = ["covered"]

pytestmark = pytest.mark.usefixtures("covered")

USER, KILLS = NOBODY, 10
#: Another user may not be able to run our interpreter: perl holds a file open, and compares pages.
PERL = """
open F, shift; open O, shift;
while (<STDIN>) {
    sysseek F, $_, 0; sysread F, $x, 4096; sysseek O, $_, 0; sysread O, $y, 4096;
    print $x eq $y ? "right" : "wrong", "\\n"; $| = 1;
}
"""


@pytest.fixture
def namespace(public_path: Path) -> Iterator[Namespace]:
    (public_path / "dev").mkdir()
    with private_mounts(public_path / "dev") as found:
        yield found


@pytest.fixture
def home(public_path: Path) -> Path:
    """A directory of USER's own, with an empty one `mnt`, and the files of a view."""
    path = public_path / "home"
    (path / "mnt").mkdir(parents=True)
    write_pair(path)
    oracle = path / "oracle"
    oracle.write_bytes(ORACLE)
    for each in [path, *path.rglob("*")]:
        os.chown(each, USER, USER)
    for each in path.glob("*.mem"):
        each.chmod(0o644)
    return path


@pytest.mark.parametrize("options", [[], ["--open-rw"], ["--allow-other"]], ids=str)
def test_through_fusermount3(
    options: list[str], namespace: Namespace, home: Path, public_path: Path
) -> None:
    """A file that stays open, and files that are opened, are right over kills"""
    conf = public_path / "fuse.conf"
    conf.write_text("user_allow_other\n")
    namespace.bind(conf, "/etc/fuse.conf")
    files = [f"--base={home}/base.mem", f"--diff={home}/diff.mem"]
    more = [f"--log={home}/log", f"--state-dir={home}/state", *options]
    done = namespace.diffmergefs(USER, USER, "mount", *more, *files, home / "mnt")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    view, log = home / "mnt" / "base.mem", home / "log"
    reader = STRANGER if "--allow-other" in options else USER
    text = namespace.run(["cat", home / "mnt/.diffmergefs" / STATUS_FILE], USER, USER).stdout
    keeper = Status.from_json(text).service.keeper
    enter = [
        "nsenter",
        f"--target={namespace.pid}",
        "--mount",
        f"--setuid={reader}",
        f"--setgid={reader}",
    ]
    holder = subprocess.Popen(
        [*enter, "perl", "-e", PERL, str(view), str(home / "oracle")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
    )
    try:
        assert holder.stdin is not None and holder.stdout is not None
        for number in range(KILLS):
            os.kill(server_of(keeper), signal.SIGKILL)
            done = namespace.run(["cmp", view, home / "oracle"], reader, reader)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
            print(number * 65536, file=holder.stdin, flush=True)
            assert holder.stdout.readline() == "right\n"
            expected = number + 1
            until(lambda: log.read_text().count(TOOK_OVER) >= expected, "no takeover")  # noqa: B023
    finally:
        holder.kill()
        holder.communicate(timeout=60)
    done = namespace.diffmergefs(USER, USER, "umount", home / "mnt")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    until(lambda: is_dead(keeper), "the keeper did not end")
    assert namespace.mount_options(home / "mnt") is None
    assert "Traceback" not in log.read_text() and " ERROR " not in log.read_text()


def test_in_a_user_namespace(home: Path, public_path: Path) -> None:
    """Its root mounts without fusermount3"""
    skips.require_user_namespaces()
    skips.require_fuse()
    for each in [home, *home.rglob("*")]:
        os.chown(each, 0, 0)
    view = home / "mnt" / "base.mem"
    script = f"""
    {sys.executable} -m diffmergefs mount --log={home}/log --state-dir={home}/state \\
        --base={home}/base.mem --diff={home}/diff.mem {home}/mnt || exit 1
    while read -r _; do
        cmp {view} {home}/oracle && echo right || echo wrong
    done
    umount {home}/mnt && echo unmounted
    """
    shell = subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert shell.stdin is not None and shell.stdout is not None
    try:
        for number in range(KILLS):
            print(file=shell.stdin, flush=True)
            assert shell.stdout.readline() == "right\n"
            keeper = keeper_with(home / "mnt")
            os.kill(server_of(keeper), signal.SIGKILL)
            if number % 2:
                time.sleep(0.05)
        found, _ = shell.communicate(timeout=60)
        assert found == "unmounted\n"
        until(lambda: not processes_with(home / "mnt"), "its processes are left")
        assert TOOK_OVER in (home / "log").read_text()
    finally:
        shell.kill()
        shell.communicate(timeout=60)
        for pid in processes_with(home / "mnt"):
            os.kill(pid, signal.SIGKILL)
