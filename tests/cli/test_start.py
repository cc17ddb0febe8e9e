"""The command line as a whole: help, exit codes, one line for a mistake, hard names, pipes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from diffmergefs import cli
from diffmergefs.cli.verbs import TABLE, load
from diffmergefs.core import errors
from diffmergefs.core.errors import DiffMergeError
from tests.support.commands import (
    DENIED,
    diffmergefs,
    diffmergefs_as_nobody,
    mistake,
    one_line,
    succeed,
)
from tests.support.images import PAGE, write_layer
from tests.support.places import REPOSITORY
from tests.support.stores import BASE_PAGES, SIZE, pages, write_chain, write_numbered, write_tag

ACCESS = errors.FileAccessError.exit_code
VERBS = {"mount", "umount", "list", "info", "flatten", "apply", "demo"}


def error_classes() -> list[type[DiffMergeError]]:
    found = [DiffMergeError]
    for cls in found:
        found.extend(cls.__subclasses__())
    return found


@pytest.fixture
def store(public_path: Path) -> Path:
    return write_chain(public_path / "store", ["base", "work"])


def test_every_error_that_a_user_meets_has_an_exit_code_of_its_own() -> None:
    codes = [cls.exit_code for cls in error_classes() if cls is not DiffMergeError]
    assert len(codes) > 10
    assert len(set(codes)) == len(codes)
    assert not {0, 1, 2, cli.BUG} & set(codes)
    assert all(2 < code < 126 for code in codes)


@pytest.mark.parametrize("cls", error_classes(), ids=lambda cls: cls.__name__)
def test_an_error_is_one_line_and_its_exit_code(
    cls: type[DiffMergeError], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    error = cls.__new__(cls)
    error.args = ("/a/path: went\nwrong",)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("diffmergefs.cli.look.read_catalog", fail)
    assert cli.main(["list", "."]) == cls.exit_code
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("diffmergefs: /a/path: went")


def test_a_bug_is_a_traceback_and_a_status_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("diffmergefs.cli.look.read_catalog", lambda *_, **__: 1 // 0)
    assert cli.main(["list", "."]) == 70
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" in err and "ZeroDivisionError" in err
    assert "bug in diffmergefs" in err.splitlines()[-1]


def test_what_the_system_refuses_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error", "/a/path")

    monkeypatch.setattr("diffmergefs.cli.look.read_catalog", fail)
    assert cli.main(["list", "."]) == ACCESS
    assert capfd.readouterr().err == "diffmergefs: /a/path: Input/output error; check the storage\n"


def test_a_caller_in_the_same_process_gets_its_signal_handlers_back(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise SIGTERM would raise SystemExit in whatever that process does next."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    assert before == [signal.SIG_DFL] * 2

    def run(*arguments: object, **options: object) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("SIGTERM did not end it")

    assert cli.main(["list", str(store)]) == 0
    assert [signal.getsignal(number) for number in numbers] == before
    monkeypatch.setattr(cli.cli, "main", run)
    with pytest.raises(SystemExit) as ended:
        cli.main(["list", str(store)])
    assert ended.value.code == 128 + signal.SIGTERM
    assert [signal.getsignal(number) for number in numbers] == before


def test_every_verb_is_there_and_its_help_has_an_example() -> None:
    assert set(TABLE) >= VERBS
    for verb in TABLE:
        command = load(verb)
        assert command is not None and command.name == verb
        text = succeed(verb, "--help")
        assert re.search(rf"Examples?:\n  .*\bdiffmergefs {verb}\b", text), verb
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.opts[0] in text
                assert parameter.help, (verb, parameter.opts)


# What is heavy to load.
HEAVY = ("rich", "multiprocessing", "urllib.request", "importlib.metadata", "pyfuse3", "trio")


@pytest.mark.parametrize(
    "call",
    [
        ["--version"],
        ["flatten", "--json", "{store}/work", "-o", "{store}/whole.mem"],
        ["info", "--json", "{store}/work"],
        ["mount", "--help"],
    ],
    ids=lambda call: call[0],
)
def test_a_verb_loads_only_what_it_needs(call: list[str], store: Path) -> None:
    code = (
        "import sys\nfrom diffmergefs.cli import main\nassert main(sys.argv[2:]) == 0\n"
        "print(*(name for name in sys.argv[1].split(',') if name in sys.modules))"
    )
    arguments = [part.format(store=store) for part in call]
    command = [sys.executable, "-c", code, ",".join(HEAVY), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == ""


def test_help_and_version_of_the_whole() -> None:
    text = succeed("--help")
    assert all(f"\n  {verb} " in text for verb in VERBS)
    assert succeed("--version").startswith("diffmergefs, version ")
    assert succeed("-V") == succeed("--version")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["help", "nonsense"],
        ["list"],
        ["list", "a", "b"],
        ["list", "--layout=other", "."],
        ["list", "--nonsense", "."],
        ["list", "--page-size=1000", "."],
        ["list", "--page-size=x", "."],
        ["info"],
        ["info", "image", "--base", "b"],
        ["info", "--diff", "d"],
        ["info", "image", "--diff", "d"],
        ["flatten", "image"],
        ["apply", "diff"],
        ["mount"],
        ["mount", "a", "b", "c"],
        ["mount", "--timeout=soon", "a", "b"],
        ["mount", "-o", "page_size=7", "a", "b"],
        ["mount", "-o", "layout=other", "a", "b"],
        ["umount"],
        ["list", ""],
        ["info", ""],
        ["info", "--base", "", "--diff", "file"],
        ["flatten", "image", "-o", ""],
        ["mount", "", "mnt"],
        ["mount", ".", ""],
        ["umount", ""],
    ],
    ids=" ".join,
)
def test_usage_errors_end_with_2_and_change_nothing(arguments: list[str], tmp_path: Path) -> None:
    line = one_line(diffmergefs(*arguments, cwd=tmp_path), 2)
    assert "; " in line
    assert os.listdir(tmp_path) == []


def test_without_arguments_the_help_goes_to_stderr() -> None:
    done = diffmergefs()
    assert (done.returncode, done.stdout, done.stderr) == (2, "", succeed("--help"))


@pytest.mark.parametrize("verb", ["list", "flatten", "umount"])
def test_help_of_a_verb_in_three_ways(verb: str) -> None:
    text = succeed(verb, "--help")
    assert text.startswith(f"Usage: diffmergefs {verb} ")
    assert succeed("help", verb) == succeed(verb, "-h") == text


def test_help_of_the_whole_in_three_ways() -> None:
    assert succeed("help") == succeed("-h") == succeed("--help")
    assert succeed("help", "unmount") == succeed("help", "umount")


@pytest.mark.parametrize(
    "arguments",
    [
        ["list", "{missing}"],
        ["list", "{file}"],
        ["info", "{missing}"],
        ["info", "{file}"],
        ["info", "{fifo}"],
        ["info", "--base", "{missing}"],
        ["info", "--base", "{folder}"],
        ["info", "--base", "{fifo}"],
        ["info", "--base", "/dev/null"],
        ["info", "--base", "{file}", "--diff", "{missing}"],
        ["flatten", "{missing}", "-o", "{new}"],
        ["flatten", "--base", "{file}", "-o", "{folder}/no/such"],
        ["apply", "{missing}", "{file}"],
        ["apply", "{folder}", "{file}"],
    ],
    ids=" ".join,
)
def test_a_missing_or_wrong_file_is_one_line(tmp_path: Path, arguments: list[str]) -> None:
    names = {name: tmp_path / name for name in ("missing", "file", "folder", "fifo", "new")}
    names["file"].write_bytes(bytes(PAGE))
    names["folder"].mkdir()
    os.mkfifo(names["fifo"])
    given = [argument.format(**names) for argument in arguments]
    mistake(ACCESS, *given)
    assert not names["new"].exists()
    assert names["file"].read_bytes() == bytes(PAGE)


def test_a_snapshot_that_is_not_there_or_broken_is_one_line(store: Path) -> None:
    (store / "empty").mkdir()
    write_tag(store, "orphan", "nobody")
    broken = errors.BrokenChainError.exit_code
    assert f"{store}/empty: is neither a snapshot nor" in mistake(broken, "info", store / "empty")
    assert "parent 'nobody' of 'orphan' is missing" in mistake(broken, "info", store / "orphan")


def test_layers_of_different_sizes_are_one_line_with_both_numbers(store: Path) -> None:
    other = write_tag(store, "other", size=SIZE + PAGE) / "memory.bin"
    base = store / "base" / "memory.bin"
    line = mistake(errors.SizeMismatchError.exit_code, "info", "--base", base, "--diff", other)
    assert str(SIZE) in line and str(SIZE + PAGE) in line


def test_what_a_user_may_not_read_is_one_line(store: Path) -> None:
    memory = store / "work" / "memory.bin"
    memory.chmod(0o600)
    done = diffmergefs_as_nobody("info", store / "work")
    assert one_line(done, ACCESS) == f"diffmergefs: {memory}: {DENIED}\n"
    done = diffmergefs_as_nobody("info", "--base", memory)
    assert one_line(done, ACCESS) == f"diffmergefs: {memory}: {DENIED}\n"
    done = diffmergefs_as_nobody("list", store)
    assert (done.returncode, done.stderr) == (0, "")
    assert "broken: work/memory.bin: Permission denied" in done.stdout
    store.chmod(0o700)
    done = diffmergefs_as_nobody("list", store)
    assert one_line(done, ACCESS) == f"diffmergefs: {store}: {DENIED}\n"


def test_hard_names_are_printed_escaped(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff\x1b[31m\n"
    line = mistake(ACCESS, "list", os.fsdecode(name))
    assert f"{tmp_path}/\\xff\\x1b[31m\\n: No such file" in line
    write_numbered(tmp_path, ["0-\udcff.mem", "1-[red]x[bold] :smile:.mem", "2-a\nb\x1b.mem"])
    rows = succeed("list", tmp_path).splitlines()
    assert [re.split("  +", row)[0] for row in rows] == [
        "TAG",
        "[red]x[bold] :smile:",
        "a\\nb\\x1b",
        "\\xff",
    ]


def test_a_name_that_the_outputs_encoding_lacks_is_escaped(tmp_path: Path) -> None:
    write_numbered(tmp_path, ["000-é.mem"])
    done = diffmergefs("list", tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].startswith("\\xe9 ")


#: Each verb that prints what it found or did, and the options that print by themselves.
PRINTING = {
    "apply": "apply {store}/work/memory.bin {own}",
    "compare": "compare {store}/base {store}/work",
    "completion": "completion bash",
    "doctor": "doctor {store}",
    "flatten": "flatten {store}/work -o {new}",
    "info": "info {store}/work",
    "info --json": "info --json {store}/work",
    "list": "list {store}",
    "list --json": "list --json {store}",
    "map": "map {store}/work",
    "prefetch": "prefetch --json --show {store}/work",
    "rediff": "rediff {store}/base {store}/work -o {new}",
    "seal": "seal {store}/work/memory.bin",
    "squash": "squash {store}/work -o {new}",
    "verify": "verify {store}/work",
    "--help": "--help",
    "--version": "--version",
    "list --help": "list --help",
}
#: These print nothing, or need a mount or a client.
SILENT = {"mount", "umount", "demo", "status", "install-extras", "uffd"}


def said_badly(
    words: str, store: Path, stdout: int | None, stderr: int | None, unbuffered: str
) -> subprocess.CompletedProcess[str]:
    """A command whose streams take nothing; whatever is None is read."""
    own = write_layer(store.parent / "own.mem", SIZE, pages(0, BASE_PAGES))
    named = words.format(store=store, own=own, new=store.parent / "new")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [sys.executable, "-m", "diffmergefs", *named.split()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if stdout is None else stdout,
        stderr=subprocess.PIPE if stderr is None else stderr,
        text=True,
        env=kept | {"PYTHONUNBUFFERED": unbuffered},
        timeout=60,
        check=False,
    )


def test_each_verb_prints_or_is_silent() -> None:
    assert {words.split()[0] for words in PRINTING if words[0] != "-"} | SILENT == set(TABLE)


@pytest.mark.parametrize("words", PRINTING)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_under_stdout_is_one_line(store: Path, words: str, unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        done = said_badly(PRINTING[words], store, full.fileno(), None, unbuffered)
    assert done.returncode == ACCESS
    assert done.stderr.endswith(
        "diffmergefs: output: No space left on device; write it where there is more space\n"
    )
    assert "Traceback" not in done.stderr and "ignored" not in done.stderr


@pytest.mark.parametrize("words", PRINTING)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_of_stdout_that_went_away(store: Path, words: str, unbuffered: str) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = said_badly(PRINTING[words], store, write_end, None, unbuffered)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("words", ["list {store}/none", "list --none", "info {store}/work"])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_stderr_that_takes_nothing_changes_no_exit_code(
    store: Path, words: str, both: bool, unbuffered: str
) -> None:
    expected = ACCESS if "work" not in words or both else 0
    with open("/dev/full", "w") as full:
        stdout = full.fileno() if both else None
        done = said_badly(words, store, stdout, full.fileno(), unbuffered)
    assert done.returncode == (2 if "--none" in words else expected)
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = said_badly(words, store, None, write_end, unbuffered)
    os.close(write_end)
    assert done.returncode == (2 if "--none" in words else ACCESS if "none" in words else 0)


def test_a_current_directory_that_was_removed_is_one_line(store: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f'cd {gone}; rmdir {gone}; exec "{sys.executable}" -m diffmergefs list'
    for path, expected in (("x", ACCESS), (str(store), 0)):
        done = subprocess.run(
            ["/bin/sh", "-c", f"{command} {path}"],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            timeout=60,
            check=False,
        )
        assert done.returncode == expected, done
        if expected:
            line = "diffmergefs: the current directory was removed; change to another one\n"
            assert done.stderr == line


def test_a_closed_stdout_is_no_error(store: Path) -> None:
    command = f'exec "{sys.executable}" -m diffmergefs list "{store}" >&-'
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


PROGRESS = {
    "list": (["list", "{store}"], "2/2 snapshots"),
    "info": (["info", "{store}/work"], "open"),
    "apply": (["apply", "{store}/work/memory.bin", "{store}/../own.mem"], "/? "),
    "flatten": (["flatten", "{store}/work", "-o", "{store}/new"], "flatten"),
    "rediff": (["rediff", "{store}/base", "{store}/work", "-o", "{store}/new"], "rediff"),
    "rediff --store": (["rediff", "--store", "{store}", "-o", "{store}.new"], "rediff"),
    "squash": (["squash", "{store}/work", "-o", "{store}/new"], "squash"),
    "compare": (["compare", "{store}/work", "{store}/work"], "compare"),
}


@pytest.mark.parametrize("verb", PROGRESS)
def test_a_terminal_gets_a_progress_bar(verb: str, store: Path) -> None:
    """On stderr, and only where that is a terminal: whatever total is known."""
    arguments, text = PROGRESS[verb]
    write_layer(store.parent / "own.mem", SIZE, pages(0, BASE_PAGES))
    command = [sys.executable, "-m", "diffmergefs", *(a.format(store=store) for a in arguments)]
    ours, theirs = os.openpty()
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=theirs,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "120", "NO_COLOR": "1"},
            timeout=60,
            check=False,
        )
        os.set_blocking(ours, False)
        shown = os.read(ours, 1 << 16).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 0 and done.stdout
    assert text in shown and "Traceback" not in shown
    assert "\x1b[2K" in shown.rpartition(text)[2]  # and is wiped away in the end


# A Python in which this package cannot be imported.
_WITHOUT = """
import sys
sys.modules[sys.argv[1]] = None
from diffmergefs import cli
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("package", "verb", "error"),
    [
        ("rich", "list", errors.MissingExtraError),
        ("pyfuse3", "mount", errors.MountFailedError),
        ("trio", "mount", errors.MountFailedError),
        ("prometheus_client", "mount", errors.MissingExtraError),
    ],
)
def test_a_missing_package_is_one_line_with_the_command_that_installs_it(
    package: str, verb: str, error: type[DiffMergeError], store: Path, mountpoint: Path
) -> None:
    arguments = [verb, str(store)]
    if verb == "mount":
        arguments = [verb, "-f", str(store), str(mountpoint)]
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT, package, *arguments],
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=60,
    )
    line = one_line(done, error.exit_code)
    assert f"{sys.executable} -m pip install {package}" in line
