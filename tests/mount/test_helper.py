"""mount.fuse.diffmergefs: by itself, and run by mount(8) in a namespace that has it in /sbin."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffmergefs.cli.helper import NAME, main
from diffmergefs.core.errors import OutputRefusedError
from tests.support.images import overlay_oracle
from tests.support.namespaces import Namespace, private_mounts
from tests.support.stores import BASE_PAGES, SIZE, pages
from tests.support.subjects.helper import FAILED, USAGE, store
from tests.support.users import NOBODY

__all__ = ["store"]

HELPER = Path(sys.executable).parent / NAME
SBIN = Path(os.path.realpath("/sbin")) / NAME
LINK = Path("/usr/local/bin/diffmergefs")
LEAF = overlay_oracle(SIZE, [pages(0, BASE_PAGES), pages(1, [1])])


@pytest.fixture
def namespace(public_path: Path) -> Iterator[Namespace]:
    """A mount namespace in which root can install, with no trace outside of it."""
    before = os.path.lexists(SBIN)
    for name in ("dev", "sbin", "local"):
        (public_path / name).mkdir()
    with private_mounts(public_path / "dev") as found:
        found.make_writable("/sbin", public_path / "sbin")
        found.make_writable("/usr/local", public_path / "local")
        found.run(["rm", "-f", SBIN, LINK], check=True)
        try:
            yield found
        finally:
            found.detach_below(public_path)
    assert os.path.lexists(SBIN) == before


@pytest.fixture
def installed(namespace: Namespace) -> Namespace:
    """As `install-extras` leaves it."""
    namespace.run(["ln", "-sT", HELPER, SBIN], check=True)
    return namespace


def mount(namespace: Namespace, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """mount(8), with an empty environment."""
    return namespace.run(["/usr/bin/env", "-i", "/bin/mount", *arguments])


def umount(namespace: Namespace, path: Path) -> None:
    done = namespace.run(["/usr/bin/env", "-i", "/bin/umount", path])
    assert done.returncode == 0, done


def options(public_path: Path, *further: str) -> str:
    """For -o: the log and the state directory of a test, and more."""
    return ",".join([f"log={public_path}/log", f"state_dir={public_path}/state", *further])


def read(namespace: Namespace, path: Path, uid: int = 0) -> bytes | None:
    done = namespace.run(["od", "-An", "-v", "-tx1", path], uid, uid)
    return bytes.fromhex(done.stdout) if done.returncode == 0 else None


# By mount(8)


def test_mount_of_the_type(
    installed: Namespace, store: Path, mountpoint: Path, public_path: Path
) -> None:
    given = options(public_path, "allow_other", "open_rw", "timeout=20")
    done = mount(installed, "-t", "fuse.diffmergefs", store, mountpoint, "-o", given)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    own, of_filesystem, kind = installed.mount_options(mountpoint) or (set(), set(), "")
    assert kind == "fuse.diffmergefs"
    assert own >= {"nosuid", "nodev", "noexec"}
    assert "allow_other" in of_filesystem
    assert read(installed, mountpoint / "leaf" / "memory.bin", NOBODY) == LEAF
    assert "ready" in (public_path / "log").read_text()
    umount(installed, mountpoint)
    assert installed.mount_options(mountpoint) is None


def test_a_line_of_fstab(
    installed: Namespace, store: Path, mountpoint: Path, public_path: Path
) -> None:
    """With options of mount(8), systemd and desktops; and `mount -a` mounts it once."""
    words = "defaults,dev,suid,_netdev,nofail,x-systemd.automount,x-gvfs-show,X-mount.mkdir,user"
    words += ',context="system_u:object_r:x:s0:c1,c2",comment="a,b"'
    fstab = public_path / "fstab"
    given = options(public_path, words)
    fstab.write_text(f"{store} {mountpoint} fuse.diffmergefs {given} 0 0\n")
    for _ in range(2):
        done = mount(installed, "-T", fstab, "-a")
        assert (done.returncode, done.stderr) == (0, ""), done
    places = installed.run(["findmnt", "-nro", "SOURCE,FSTYPE", mountpoint]).stdout
    assert places == f"{store} fuse.diffmergefs\n"
    assert read(installed, mountpoint / "leaf" / "memory.bin") == LEAF
    umount(installed, mountpoint)


def test_a_line_of_fstab_with_explicit_layers(
    installed: Namespace, store: Path, mountpoint: Path, public_path: Path
) -> None:
    base = store / "base" / "memory.bin"
    diff = store / "leaf" / "a,b c.diff"
    (store / "leaf" / "memory.bin").rename(diff)
    escaped = str(diff).replace(",", "\\,").replace(" ", "\\040").replace("\\,", "\\134,")
    fstab = public_path / "fstab"
    given = options(public_path, f"diff={escaped}", "ro")
    fstab.write_text(f"{base} {mountpoint} fuse.diffmergefs {given} 0 0\n")
    for _ in range(2):
        done = mount(installed, "-T", fstab, "-a")
        assert (done.returncode, done.stderr) == (0, ""), done
    assert installed.run(["findmnt", "-nro", "SOURCE", mountpoint]).stdout == f"{base}\n"
    assert read(installed, mountpoint / "memory.bin") == LEAF
    umount(installed, mountpoint)


def test_an_ordinary_user_mounts_what_fstab_lets_him(
    installed: Namespace, store: Path, public_path: Path
) -> None:
    home = public_path / "home"
    (home / "mnt").mkdir(parents=True)
    for path in (home, home / "mnt"):
        os.chown(path, NOBODY, NOBODY)
    # His interpreter must be one that he can run: the environment of the tests may be root's own.
    python = public_path / "python"
    python.write_text(f'#!/bin/sh\necho "$(id -u)" "$@" > {home}/ran\n')
    python.chmod(0o755)
    installed.run(["ln", "-sfT", python, SBIN], check=True)
    fstab = public_path / "fstab"
    fstab.write_text(f"{store} {home}/mnt fuse.diffmergefs user,noauto,log={home}/log 0 0\n")
    installed.bind(fstab, "/etc/fstab")
    done = installed.run(["/usr/bin/env", "-i", "/bin/mount", home / "mnt"], NOBODY, NOBODY)
    assert done.returncode == 0, done
    uid, *arguments = (home / "ran").read_text().split()
    assert uid == str(NOBODY)
    # Just what mount(8) handed over, taken in by the helper itself.
    assert main([*arguments, "-f"]) == 0


@pytest.mark.parametrize("given", ["nonsense", "diff=/nowhere"])
def test_what_is_refused_is_named(
    given: str, installed: Namespace, store: Path, mountpoint: Path, public_path: Path
) -> None:
    source = store / "base" / "memory.bin" if "diff" in given else store
    arguments: list[str | Path] = [
        "-t",
        "fuse.diffmergefs",
        source,
        mountpoint,
        "-o",
        options(public_path, given),
    ]
    done = mount(installed, *arguments)
    assert done.returncode == (FAILED if "diff" in given else USAGE), done
    assert given.removeprefix("diff=") in done.stderr and "Traceback" not in done.stderr
    assert installed.mount_options(mountpoint) is None


def test_sloppy_leaves_out_what_is_unknown(
    installed: Namespace, store: Path, mountpoint: Path, public_path: Path
) -> None:
    arguments: list[str | Path] = ["-t", "fuse.diffmergefs", store, mountpoint]
    done = mount(installed, "-s", *arguments, "-o", options(public_path, "nonsense"))
    assert (done.returncode, done.stderr) == (
        0,
        "diffmergefs: -o nonsense: unknown option, ignored\n",
    )
    umount(installed, mountpoint)


def test_a_missing_source_is_one_line_and_a_status_of_mount(
    installed: Namespace, mountpoint: Path, public_path: Path
) -> None:
    missing = public_path / "none"
    arguments: list[str | Path] = [
        "-t",
        "fuse.diffmergefs",
        missing,
        mountpoint,
        "-o",
        options(public_path),
    ]
    done = mount(installed, *arguments)
    assert done.returncode == FAILED
    assert done.stderr == f"diffmergefs: {missing}: No such file or directory; check its name\n"


def test_fake_and_verbose_and_without_mtab(
    installed: Namespace, store: Path, mountpoint: Path, public_path: Path
) -> None:
    arguments: list[str | Path] = [
        "-t",
        "fuse.diffmergefs",
        store,
        mountpoint,
        "-o",
        options(public_path),
    ]
    done = mount(installed, "-f", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert installed.mount_options(mountpoint) is None
    assert not (public_path / "log").exists()
    done = mount(installed, "-nv", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert installed.mount_options(mountpoint) is not None
    umount(installed, mountpoint)


# install-extras, as root


def install_extras(namespace: Namespace, *options: str) -> subprocess.CompletedProcess[str]:
    return namespace.run([HELPER.parent / "diffmergefs", "install-extras", *options])


def test_the_link_leads_to_a_script_with_an_absolute_interpreter(namespace: Namespace) -> None:
    for _ in range(2):  # again, as after an upgrade
        done = install_extras(namespace)
        assert done.returncode == 0, done
        assert f"{SBIN.name} -> {HELPER}" in done.stdout
    assert namespace.run(["readlink", SBIN]).stdout == f"{HELPER}\n"
    assert str(Path(sys.executable).parent) in HELPER.read_text().split("\n\n")[0]
    done = namespace.run(["/usr/bin/env", "-i", SBIN, "--help"])
    assert done.returncode == 0 and done.stdout.startswith("Usage: mount.fuse.diffmergefs")
    done = namespace.run(["/usr/bin/env", "-i", LINK, "--version"])
    assert done.returncode == 0 and done.stdout.startswith("diffmergefs")
    assert install_extras(namespace, "--uninstall").returncode == 0
    assert namespace.run(["ls", SBIN]).returncode != 0
    assert namespace.run(["ls", LINK]).returncode != 0


def test_a_helper_that_is_not_ours_is_not_replaced(namespace: Namespace) -> None:
    namespace.run(["cp", "/bin/true", SBIN], check=True)
    done = install_extras(namespace)
    assert done.returncode == OutputRefusedError.exit_code
    assert "exists, and is not a link to diffmergefs" in done.stderr
    assert namespace.run(["ls", LINK]).returncode != 0
    assert install_extras(namespace, "--uninstall").returncode == 0
    assert namespace.run(["cmp", "/bin/true", SBIN]).returncode == 0
