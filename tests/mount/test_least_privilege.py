"""Mounting as an ordinary user, what a mount never allows, and whom root does not believe."""

from __future__ import annotations

import ctypes
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from diffmergefs.opening.writers import Writers
from diffmergefs.system import mounted
from diffmergefs.system import mountpoint as mountpoints
from diffmergefs.system.children import ROOTS_PATH
from tests.support import mounttable
from tests.support.commands import diffmergefs, mistake, one_line
from tests.support.images import overlay_oracle
from tests.support.live import until
from tests.support.namespaces import Namespace, private_mounts
from tests.support.processes import processes_with
from tests.support.restores import ORACLE, scattered, write_pair
from tests.support.stores import BASE_PAGES, SIZE, pages, write_chain
from tests.support.users import NOBODY, STRANGER

# fusermount3 wants its user to have an account; these are in every system.
USER, OTHER = NOBODY, 1
FAILED = 11
#: Another user may not be able to run our interpreter.
GUEST = 'open F, "<", shift; for (@ARGV) { sysseek F, 4096 * $_, 0; sysread F, $x, 1 or die }'
LEAF = overlay_oracle(SIZE, [pages(0, BASE_PAGES), pages(1, [1]), pages(2, [2])])
ALWAYS = {"nosuid", "nodev", "noexec"}


def give(root: Path, uid: int) -> None:
    for path in [root, *root.rglob("*")]:
        os.chown(path, uid, uid)


@pytest.fixture
def store(public_path: Path) -> Path:
    return write_chain(public_path / "store", ["base", "work", "leaf"])


@pytest.fixture
def namespace(public_path: Path) -> Iterator[Namespace]:
    (public_path / "dev").mkdir()
    with private_mounts(public_path / "dev") as found:
        yield found


@pytest.fixture
def home(public_path: Path) -> Path:
    """A directory of USER's own, with an empty one `mnt` to mount on."""
    path = public_path / "home"
    (path / "mnt").mkdir(parents=True)
    give(path, USER)
    return path


@contextmanager
def mounted_by_user(
    namespace: Namespace, home: Path, *arguments: str | Path
) -> Iterator[tuple[Path, Path]]:
    """A mount made by USER in the background, on home/mnt; where it is and its log."""
    log = home / "log"
    options = [f"--log={log}", f"--state-dir={home}/state"]
    done = namespace.diffmergefs(USER, USER, "mount", *options, *arguments, home / "mnt")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    yield home / "mnt", log
    done = namespace.diffmergefs(USER, USER, "umount", home / "mnt")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert namespace.mount_options(home / "mnt") is None


def read_as(namespace: Namespace, uid: int, path: Path) -> bytes | None:
    """What this user reads from the file, or None if that fails."""
    done = namespace.run(["od", "-An", "-v", "-tx1", path], uid, uid)
    return bytes.fromhex(done.stdout) if done.returncode == 0 else None


# As an ordinary user


@pytest.mark.parametrize("owner", [USER, OTHER], ids=["own", "of-another"])
def test_an_ordinary_user_mounts_through_fusermount3(
    namespace: Namespace, store: Path, home: Path, owner: int
) -> None:
    give(store, owner)
    with mounted_by_user(namespace, home, store) as (mnt, log):
        names = namespace.run(["ls", mnt], USER, USER).stdout.split()
        assert names == ["base", "leaf", "work"]
        view = mnt / "leaf" / "memory.bin"
        assert read_as(namespace, USER, view) == LEAF
        # Nobody else gets in, root included.
        assert [read_as(namespace, uid, view) for uid in (0, OTHER, STRANGER)] == [None] * 3
        found = namespace.mount_options(mnt)
        assert found is not None
        own, options, kind = found
        assert kind == "fuse.diffmergefs"
        assert own >= {*ALWAYS, "ro"} and "allow_other" not in options
        assert options >= {f"user_id={USER}", f"group_id={USER}", "default_permissions", "ro"}
        # To list the mounts, a user asks his own, and root asks each as its user.
        for uid in (0, USER, OTHER):
            done = namespace.diffmergefs(uid, uid, "status", "--json")
            rows = {row["mountpoint"]: row for row in json.loads(done.stdout)}
            assert (str(mnt) in rows) == (uid != OTHER)
            if uid != OTHER:
                row = rows[str(mnt)]
                assert (row["user"], row["state"]) == (USER, "serving")
            assert uid == 0 or {row["user"] for row in rows.values()} <= {uid}
        assert namespace.diffmergefs(0, 0, "status", mnt).returncode == 0
        text = log.read_text()
        assert "Traceback" not in text and " WARNING " not in text
        # Whether another user's file has a writer only that one can ask.
        assert text.count(Writers.NOT_OWNER.value) == (owner != USER)


def test_what_the_user_may_not_read_is_not_shown(
    namespace: Namespace, store: Path, home: Path
) -> None:
    give(store, OTHER)
    (store / "work" / "memory.bin").chmod(0o600)
    with mounted_by_user(namespace, home, store) as (mnt, log):
        assert read_as(namespace, USER, mnt / "base" / "memory.bin") is not None
        for tag in ("work", "leaf"):
            assert read_as(namespace, USER, mnt / tag / "memory.bin") is None
        assert "work/memory.bin: Permission denied" in log.read_text()


def test_explicit_layers_of_an_ordinary_user(namespace: Namespace, store: Path, home: Path) -> None:
    base, work = (store / tag / "memory.bin" for tag in ("base", "work"))
    with mounted_by_user(namespace, home, "--base", base, "--diff", work) as (mnt, _):
        expected = overlay_oracle(SIZE, [pages(0, BASE_PAGES), pages(1, [1])])
        assert read_as(namespace, USER, mnt / "memory.bin") == expected


def test_an_ordinary_user_records_and_prefetches(
    namespace: Namespace, public_path: Path, home: Path
) -> None:
    """His readahead is the kernel's, which is said; all else is as for root."""
    files = write_pair(home)
    give(home, USER)
    sets = home / "sets"
    layers = ["--base", files[0], "--diff", files[1], "--working-set-dir", sets]
    log = home / "log"
    mount = [USER, USER, "mount", f"--log={log}", f"--state-dir={home}/state"]
    done = namespace.diffmergefs(*mount, "--record", *layers, home / "mnt")  # type: ignore[arg-type]
    assert done.returncode == 0
    assert "read_ahead_kb: the readahead in KiB stays 128, not 4: Permission denied" in (
        log.read_text()
    )
    assert "the kernel reads ahead 128 KiB, not 4" in done.stderr
    guest: list[str | Path] = [
        "perl",
        "-e",
        GUEST,
        home / "mnt" / "base.mem",
        *map(str, scattered(60)),
    ]
    namespace.run(guest, USER, USER, check=True)
    until(lambda: "recorded the first touch" in log.read_text(), "nothing was recorded")
    assert namespace.diffmergefs(USER, USER, "umount", home / "mnt").returncode == 0
    (record,) = sets.iterdir()
    assert (record.stat().st_uid, stat.S_IMODE(record.stat().st_mode)) == (USER, 0o600)
    assert stat.S_IMODE(sets.stat().st_mode) == 0o700
    # Where he may not run our interpreter, as in a virtual environment of root's, fadvise has no
    # child.
    may_run = namespace.run([sys.executable, "-c", ""], USER, USER).returncode == 0
    for how in ("notify", "fadvise"):
        said = "prefetched " if may_run or how == "notify" else "Permission denied"
        log.unlink()
        done = namespace.diffmergefs(*mount, f"--prefetch={how}", *layers, home / "mnt")  # type: ignore[arg-type]
        assert (done.returncode, done.stderr) == (0, "")
        assert read_as(namespace, USER, home / "mnt" / "base.mem") == ORACLE
        until(lambda said=said: said in log.read_text(), "it was not tried")  # type: ignore[misc]
        assert "replaces notify" not in log.read_text()
        assert " WARNING " not in log.read_text()
        assert namespace.diffmergefs(USER, USER, "umount", home / "mnt").returncode == 0


def test_only_a_mount_for_writers_is_not_read_only(
    namespace: Namespace, store: Path, home: Path
) -> None:
    with mounted_by_user(namespace, home, "--open-rw", store) as (mnt, _):
        found = namespace.mount_options(mnt)
        assert found is not None
        assert found[0] >= {*ALWAYS, "rw"} and "ro" not in found[0]
        assert "allow_other" not in found[1]


@pytest.mark.parametrize("option", [["--allow-other"], ["-o", "allow_root"]])
def test_letting_others_in_takes_a_line_in_fuse_conf(
    namespace: Namespace, store: Path, home: Path, public_path: Path, option: list[str]
) -> None:
    conf = public_path / "fuse.conf"
    arguments: list[str | Path] = [
        f"--log={home}/log",
        f"--state-dir={home}/state",
        *option,
        store,
        home / "mnt",
    ]
    for text in ("", "#user_allow_other\n", "mount_max = 10000\n"):
        conf.write_text(text)
        namespace.bind(conf, "/etc/fuse.conf")
        done = namespace.diffmergefs(USER, USER, "mount", *arguments)
        line = one_line(done, FAILED)
        assert "the line user_allow_other in /etc/fuse.conf" in line
        assert namespace.mount_options(home / "mnt") is None
    conf.write_text("mount_max = 10000\nuser_allow_other\n")
    with mounted_by_user(namespace, home, *option, store) as (mnt, _):
        view = mnt / "leaf" / "memory.bin"
        assert read_as(namespace, USER, view) == LEAF
        assert read_as(namespace, 0, view) == LEAF
        others = read_as(namespace, OTHER, view)
        assert others == (LEAF if option == ["--allow-other"] else None)
        found = namespace.mount_options(mnt)
        assert found is not None and "allow_other" in found[1] and found[0] >= ALWAYS


def test_a_refusal_for_another_reason_does_not_speak_of_fuse_conf(
    namespace: Namespace, store: Path, home: Path, public_path: Path
) -> None:
    conf = public_path / "fuse.conf"
    conf.write_text("user_allow_other\n")
    namespace.bind(conf, "/etc/fuse.conf")
    namespace.bind(Path("/dev/null"), "/dev/fuse")
    arguments: list[str | Path] = [
        "--allow-other",
        f"--state-dir={home}/state",
        store,
        home / "mnt",
    ]
    done = namespace.diffmergefs(USER, USER, "mount", f"--log={home}/log", *arguments)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == FAILED
    assert "/dev/fuse" in line and "fuse.conf" not in line


def test_a_configuration_that_only_root_reads_is_no_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, make, expected in (
        ("missing", lambda path: None, False),
        ("directory", Path.mkdir, True),
        ("empty", Path.touch, False),
        ("set", lambda path: path.write_text(" user_allow_other \n"), True),
    ):
        make(tmp_path / name)
        monkeypatch.setattr(mountpoints, "FUSE_CONF", str(tmp_path / name))
        assert mountpoints.others_may_be_let_in() is expected, name


# What a mount never allows


@pytest.mark.parametrize("option", ["suid", "dev", "exec", "rw"])
def test_no_option_takes_back_what_is_always_set(
    store: Path, mountpoint: Path, option: str
) -> None:
    line = mistake(2, "mount", "-f", "-o", option, store, mountpoint)
    assert line.startswith(f"diffmergefs: mount: -o {option}: a view is always ")
    assert mounttable.at(str(mountpoint)) == []


@pytest.mark.parametrize("option", [[], ["--open-rw"], ["--allow-other"], ["-o", "auto_unmount"]])
def test_the_options_of_roots_mount(
    namespace: Namespace, store: Path, mountpoint: Path, option: list[str]
) -> None:
    argv = [sys.executable, "-m", "diffmergefs", "mount", "--log=/dev/null", *option]
    assert namespace.run([*argv, store, mountpoint]).returncode == 0
    found = namespace.mount_options(mountpoint)
    assert found is not None
    own, options, _ = found
    assert own >= ALWAYS
    assert ("ro" in own) == (option != ["--open-rw"])
    assert ("allow_other" in options) == (option == ["--allow-other"])
    (store / "leaf" / "program").write_text("#!/bin/sh\n")
    (store / "leaf" / "program").chmod(0o4755)
    program = mountpoint / "leaf" / "program"
    assert namespace.run(["stat", "-c", "%a", program]).stdout.strip() == "755"
    assert namespace.run([program]).returncode != 0


# Whom root does not believe

_PLANTED = "#!/bin/sh\necho $0 $* >> {}\nexit 1\n"
_NAMES = ("fusermount3", "fusermount", "mount", "umount", "bash", "sh", "modprobe", "env")


class Plant:
    """Somebody's environment, in which everything leads to programs of theirs."""

    def __init__(self, folder: Path) -> None:
        self.ran = folder / "ran"
        programs = folder / "programs"
        self.state = folder / "state"
        for path in (folder, programs, self.state):
            path.mkdir()
        for name in _NAMES:
            (programs / name).write_text(_PLANTED.format(self.ran), encoding="utf-8")
            (programs / name).chmod(0o755)
        self.environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(folder),
            "XDG_STATE_HOME": str(self.state),
            "XDG_RUNTIME_DIR": str(self.state),
            "TMPDIR": str(self.state),
            "SQLITE_TMPDIR": str(self.state),
        }


@pytest.fixture
def plant(public_path: Path) -> Plant:
    return Plant(public_path / "plant")


def run_with(
    namespace: Namespace, environment: Mapping[str, str], *arguments: str | Path
) -> subprocess.CompletedProcess[str]:
    """The command line as root in the namespace, with this added to its environment."""
    command = [sys.executable, "-m", "diffmergefs", *arguments]
    # By env(1), and not in the environment of nsenter, whose own look-ups are not the point.
    added = [f"{name}={value}" for name, value in environment.items()]
    return namespace.run(["/usr/bin/env", *added, *command])


def test_the_plants_would_be_found(namespace: Namespace, plant: Plant) -> None:
    added = [f"{name}={value}" for name, value in plant.environment.items()]
    for name in _NAMES:
        namespace.run(["/usr/bin/env", *added, name, "x"])
    assert len(plant.ran.read_text().splitlines()) == len(_NAMES)


@pytest.mark.parametrize("helper", ["there", "missing"])
def test_root_runs_no_helper_from_its_callers_path(
    namespace: Namespace, store: Path, mountpoint: Path, plant: Plant, helper: str
) -> None:
    """libfuse and we ourselves look for fusermount3 along PATH if it is not where it should be."""
    if helper == "missing":
        namespace.bind(Path("/dev/null"), "/usr/bin/fusermount3")
    log = plant.state / "log"
    options: list[str | Path] = ["--log", log, "-o", "auto_unmount"]
    done = run_with(namespace, plant.environment, "mount", *options, store, mountpoint)
    assert done.returncode == (0 if helper == "there" else FAILED), done
    assert (namespace.mount_options(mountpoint) is not None) == (helper == "there")
    done = run_with(namespace, plant.environment, "mount", "--log", log, store, mountpoint)
    if helper == "missing":
        assert done.returncode == 0, done
    done = run_with(namespace, plant.environment, "umount", mountpoint)
    assert done.returncode == 0, done
    assert not plant.ran.exists()


@pytest.mark.parametrize("lazy", [[], ["--lazy"]])
def test_a_root_that_may_not_unmount_runs_no_helper_from_its_callers_path(
    namespace: Namespace, store: Path, mountpoint: Path, plant: Plant, lazy: list[str]
) -> None:
    assert run_with(namespace, {}, "mount", "--log=/dev/null", store, mountpoint).returncode == 0
    added: list[str | Path] = [f"{name}={value}" for name, value in plant.environment.items()]
    powerless: list[str | Path] = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    command: list[str | Path] = [sys.executable, "-m", "diffmergefs", "umount", *lazy, mountpoint]
    done = namespace.run([*powerless, "/usr/bin/env", *added, *command])
    assert done.returncode == 10, done
    assert not plant.ran.exists()


def test_the_library_too_looks_for_roots_helper_in_roots_directories(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", plant.environment["PATH"])
    ran: list[str] = []

    def note(argv: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        ran.append(argv[0])
        return subprocess.CompletedProcess(argv, 0, "", "")

    class Refusing:
        def umount2(self, path: bytes, flags: int) -> int:
            return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Refusing())
    monkeypatch.setattr(ctypes, "get_errno", lambda: 1)
    monkeypatch.setattr(subprocess, "run", note)
    for uid in (0, USER):
        monkeypatch.setattr(os, "geteuid", lambda uid=uid: uid)
        mounted.detach("/nowhere")
    assert [os.path.dirname(path) for path in ran] == [
        next(d for d in ROOTS_PATH.split(":") if os.path.exists(f"{d}/fusermount3")),
        plant.environment["PATH"].split(":")[0],
    ]


@pytest.mark.parametrize("variable", ["XDG_STATE_HOME", "HOME"])
def test_root_remembers_nothing_where_its_caller_says(
    namespace: Namespace, store: Path, public_path: Path, plant: Plant, variable: str
) -> None:
    """What was verified is remembered: in root's own directory, which the namespace replaces."""
    (public_path / "var").mkdir()
    Path("/var/lib/diffmergefs").mkdir(mode=0o700, exist_ok=True)
    namespace.bind(public_path / "var", "/var/lib/diffmergefs")
    done = run_with(namespace, {}, "seal", *(store / t / "memory.bin" for t in ("work", "leaf")))
    assert done.returncode == 0, done
    environment = {variable: plant.environment[variable]}
    done = run_with(namespace, environment, "verify", store / "leaf")
    assert done.returncode == 0, done
    assert os.listdir(public_path / "var") != []
    assert os.listdir(plant.state) == []
    assert {path.name for path in plant.state.parent.iterdir()} == {"programs", "state"}


def test_roots_children_get_nothing_of_its_callers_environment(
    namespace: Namespace, store: Path, mountpoint: Path, plant: Plant
) -> None:
    """auto_unmount leaves a fusermount3 behind, whose environment can be read."""
    environment = plant.environment | {
        "LD_LIBRARY_PATH": str(plant.state),
        "PYTHONSTARTUP": str(plant.state),
        "NOTIFY_SOCKET": "/run/systemd/notify",
        "JOURNAL_STREAM": "1:2",
        "TERM": "vt100",
        "LC_ALL": "C.UTF-8",
    }
    options = ["--log=/dev/null", "-o", "auto_unmount"]
    done = run_with(namespace, environment, "mount", *options, store, mountpoint)
    assert done.returncode == 0, done
    found = dict(
        entry.split("=", 1)
        for pid in processes_with(mountpoint, "fusermount3")
        for entry in Path(f"/proc/{pid}/environ").read_text().split("\0")
        if "=" in entry
    )
    assert found["PATH"] == ROOTS_PATH
    assert (found["TERM"], found["LC_ALL"]) == ("vt100", "C.UTF-8")
    assert found.keys() & environment.keys() == {"PATH", "TERM", "LC_ALL"}
    assert not any(str(plant.state.parent) in value for value in found.values())
    assert run_with(namespace, {}, "umount", mountpoint).returncode == 0


def test_no_completion_script_is_made_by_a_program_of_its_callers(
    namespace: Namespace, plant: Plant
) -> None:
    """click asks bash for its version."""
    environment = plant.environment | {"_DIFFMERGEFS_COMPLETE": "bash_source"}
    command = [
        sys.executable,
        "-c",
        "import sys; from diffmergefs.cli import main; sys.exit(main())",
    ]
    added = [f"{name}={value}" for name, value in environment.items()]
    done = namespace.run(["/usr/bin/env", *added, *command])
    assert done.returncode == 0 and "complete" in done.stdout
    assert not plant.ran.exists()


def test_the_demo_of_root_is_made_where_only_root_renames(
    namespace: Namespace, plant: Plant
) -> None:
    """In /tmp, which is sticky, and not in a TMPDIR of somebody's."""
    before = plant.state.stat().st_mtime_ns
    done = run_with(namespace, plant.environment, "demo")
    assert done.returncode == 0, done
    assert plant.state.stat().st_mtime_ns == before  # nothing was made there and removed again
    assert not plant.ran.exists()


def test_an_ordinary_users_environment_is_his_own(
    namespace: Namespace, store: Path, home: Path
) -> None:
    states = home / "states"
    states.mkdir()
    os.chown(states, USER, USER)
    sealed = [store / tag / "memory.bin" for tag in ("work", "leaf")]
    assert diffmergefs("seal", *sealed).returncode == 0
    environment = {"XDG_STATE_HOME": str(states)}
    done = namespace.diffmergefs(USER, USER, "verify", store / "leaf", environment=environment)
    assert done.returncode == 0, done
    assert stat.S_IMODE((states / "diffmergefs").stat().st_mode) == 0o700
    assert (states / "diffmergefs").stat().st_uid == USER
