"""README.md and docs/: every example is run, and every table is compared with the code.

The examples are fenced blocks, and the language of a block says what is done with it:

- ``console``: each line that begins with ``$ `` is run by bash (a backslash at its end goes on with
  the next line) and must succeed. The lines below it, if there are any, are its output on stdout
  and stderr; ``...`` stands for anything in a line, and alone for any lines.
- ``python``: run as a script, must succeed.
- ``json``: must parse, as one document or line by line.
- ``text``: pictures, synopses, formats; holds no commands.
- everything else is not run and stands in NOT_RUN with the reason; what can be checked of it is.

All blocks of a page are typed in order into one shell, in a sandbox. README begins in an empty
directory: it makes its files itself, with `demo --keep`. The other pages find the same files:
`mem_file` and the like in the current directory, and the stores in `/srv/`. For them, `/srv/` and
`/mnt/` are directories of the sandbox (the names in commands are replaced, and replaced back in
their output).
"""

from __future__ import annotations

import ast
import configparser
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import click
import pytest

import diffmergefs
from diffmergefs import cli
from diffmergefs.cli import helper
from diffmergefs.cli.demo import PAGES as PAGES_OF_IMAGE
from diffmergefs.cli.demo import make_files
from diffmergefs.cli.mountoptions import REFUSED
from diffmergefs.cli.verbs import TABLE, load
from diffmergefs.core import errors
from diffmergefs.opening import filled, trust
from tests.support import mounts, mounttable, skips
from tests.support.images import PAGE
from tests.support.places import DOCS, REPOSITORY
from tests.support.stores import age
from tests.unit.test_architecture import LEVEL

README = REPOSITORY / "README.md"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
# test_recipes.py runs these section by section.
SECTIONED = {"recipes.md", "troubleshooting.md"}
VERBS = {name: command for name in TABLE if (command := load(name))}
MAN_PAGES = {f"diffmergefs-{verb}.md": command for verb, command in VERBS.items()}
MAN_PAGES["diffmergefs.md"] = cli.cli

SIZE = PAGES_OF_IMAGE * PAGE

# The blocks that are not run: (page, a string in the block) -> why not. Nothing else is left out.
NOT_RUN = {
    ("CONTRIBUTING.md", "make demo"): "make test runs this very test",
    ("CONTRIBUTING.md", "PYTEST_ARGS"): "make test runs this very test",
    ("recipes.md", "firecracker --api-sock vm"): "vm/test_recipes.py starts it, and the next",
    ("recipes.md", "firecracker --api-sock restored"): "vm/test_recipes.py starts it",
    ("recipes.md", "firecracker --api-sock served"): "vm/test_recipes.py starts it",
    ("recipes.md", "jailer --id"): "vm/test_recipes.py starts it",
    ("recipes.md", "share=on"): "vm/test_recipes.py starts it, and types the monitor's commands",
    ("recipes.md", "share=off"): "vm/test_recipes.py starts it, and types the monitor's commands",
    ("recipes.md", "forkd-controller"): "needs forkd",
    ("recipes.md", "cloud-hypervisor --api"): "needs Cloud Hypervisor",
    ("recipes.md", "ch-remote"): "needs Cloud Hypervisor",
    ("recipes.md", "docker run"): "needs Docker",
    ("recipes.md", "mountPropagation"): "needs Kubernetes",
    ("README.md", "make demo"): "sets up the machine; the verb `demo` is run by its own page",
    ("README.md", "make deb"): "tests/packages does it, in roots of Debian",
    ("README.md", "pip install"): "installs, needs a network",
    ("README.md", "/snapshot/create"): "needs a VM in Firecracker; a test below reads the requests",
    ("README.md", "/snapshot/load"): "needs a new Firecracker; a test below reads the request",
    ("diffmergefs-install-extras.md", "sudo"): "mount/test_helper.py does it, where it may",
    ("diffmergefs-mount.md", "systemctl enable"): "needs systemd; mount/test_service.py has one",
    ("install.md", "make deb"): "tests/packages does it, in roots of Debian",
    ("install.md", "apt-get install"): "installs packages, needs root and a network",
    ("install.md", "pip install"): "installs, needs a network",
    ("install.md", "rm -r /opt"): "mount/test_helper.py does it, where it may",
    ("mount.fuse.diffmergefs.md", "install-extras"): "mount/test_helper.py does it, where it may",
    ("mount.fuse.diffmergefs.md", "mount -t fuse.diffmergefs"): "mount/test_helper.py does it",
}


class Block(NamedTuple):
    """A fenced block: the line number of its fence, its language and its lines."""

    line: int
    language: str
    lines: list[str]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def blocks_of(text: str) -> list[Block]:
    found: list[Block] = []
    block = None
    for number, line in enumerate(text.splitlines(), 1):
        fence = re.fullmatch(r"```(\w*)", line)
        if block is None and fence:
            block = Block(number, fence[1], [])
            found.append(block)
        elif line == "```":
            block = None
        elif block is not None:
            block.lines.append(line)
    assert block is None, f"a block that is not closed: line {found[-1].line}"
    return found


def blocks_in(page: Path, language: str | None = None) -> list[Block]:
    found = blocks_of(page.read_text(encoding="utf-8"))
    return [block for block in found if language in (None, block.language)]


def steps(block: Block) -> Iterator[tuple[str, list[str]]]:
    """The commands of a console block, each with the lines that are shown as its output."""
    command, shown = "", list[str]()
    continued = False
    for line in block.lines:
        if continued:
            command += "\n" + line
        elif line.startswith("$ "):
            if command:
                yield command, shown
            command, shown = line[2:], []
        else:
            assert command, f"output without a command: {line}"
            shown.append(line)
        continued = (continued or line.startswith("$ ")) and line.endswith("\\")
    assert command and not continued, f"no whole command in the block of line {block.line}"
    yield command, shown


class Sandbox:
    """A directory in which examples are run; see the top of this file."""

    def __init__(self, root: Path, own: Iterable[str] = (), *, filled: bool = True) -> None:
        self.root = root
        self._own = "|".join(("srv", "mnt", *own))
        self.work = root / "work"
        self._home = root / "home"
        self._foreground: list[subprocess.Popen[bytes]] = []
        for folder in (self.work, self._home, root / "mnt/views", root / "mnt/view"):
            folder.mkdir(parents=True)
        if filled:
            self._fill(root / "srv")
        self._shell = subprocess.Popen(
            ["bash", "-o", "pipefail"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=self.work,
            env=self._environment(),
            text=True,
        )

    def _fill(self, srv: Path) -> None:
        srv.mkdir()
        make_files(srv)
        age(*(path for path in srv.rglob("*") if path.is_file()))
        for name in ("mem_file", "snapshot_file", "mem_diff", "snapshot_diff"):
            (srv / name).rename(self.work / name)

    def inside(self, text: str) -> str:
        """The text with /srv, /mnt and the like replaced by the sandbox's own."""
        return re.sub(rf"(?<![\w./-])(?=/(?:{self._own})\b)", str(self.root), text)

    def run(self, command: str) -> tuple[int, str]:
        """Type a command of an example: its exit status and output, without the sandbox's name."""
        if "mount -f " in command or "diffmergefs uffd " in command:
            self._start(command)
            return 0, ""
        status, output = self._type(self.inside(command))
        return status, output.replace(str(self.root), "")

    def run_python(self, code: str) -> tuple[int, str]:
        command = [sys.executable, "-W", "error", "-c", self.inside(code)]
        return self._type(shlex.join(command))

    def _environment(self) -> dict[str, str]:
        # The package is installed in the environment of this interpreter, and so is its program.
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
        home = {"HOME": str(self._home), "XDG_CONFIG_HOME": "", "XDG_DATA_HOME": ""}
        return os.environ | home | {"PATH": path, "LC_ALL": "C.UTF-8"}

    def _type(self, command: str) -> tuple[int, str]:
        # The output goes into a file: a daemon that keeps a pipe open must not be waited for.
        log = self.root / "output"
        assert self._shell.stdin is not None and self._shell.stdout is not None
        self._shell.stdin.write(f"{{ {command}\n}} < /dev/null > {log} 2>&1\necho $?\n")
        self._shell.stdin.flush()
        status = self._shell.stdout.readline()
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        output = "".join(line for line in lines if "no syslog answers" not in line)
        assert status, f"the shell ended: {output}"
        # What `mount` says where there is no syslog is no part of any example.
        return int(status), output

    def _start(self, command: str) -> None:
        argv = shlex.split(self.inside(command).removesuffix("&"))
        before = len(self._mounts()) - ("uffd" in argv)
        with (self.root / "output").open("wb") as log:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.work,
                env=self._environment(),
            )
        self._foreground.append(process)
        deadline = time.monotonic() + 30
        while b" ready" not in (self.root / "output").read_bytes() or len(self._mounts()) == before:
            said = (self.root / "output").read_text()
            assert process.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.02)

    def _mounts(self) -> list[str]:
        below = f"{self.root}/"
        return [entry.path for entry in mounttable.entries() if entry.path.startswith(below)]

    def assert_clean(self) -> None:
        """Nothing is mounted any more, and what was in front has ended well."""
        assert not self._mounts(), "an example left its mount behind"
        for process in self._foreground:
            assert process.wait(60) == 0

    def close(self) -> None:
        for path in self._mounts():
            mounts.abort(path)
        mounttable.unmount_below(str(self.root))
        self._shell.kill()
        self._shell.communicate()
        for process in self._foreground:
            if process.poll() is None:
                process.kill()
                process.wait()


@contextmanager
def sandbox(root: Path, own: Iterable[str] = (), *, filled: bool = True) -> Iterator[Sandbox]:
    skips.require_mounts()
    skips.require_fuse()
    box = Sandbox(root, own, filled=filled)
    try:
        yield box
    finally:
        box.close()


def shows(expected: list[str], output: str) -> bool:
    """Whether the output is what is shown of it, with `...` for what may be anything.

    Columns may be wider than shown: the sandbox's names are longer.
    """
    pattern = ""
    for line in expected:
        if line.strip() == "...":
            pattern += r"(?:.*\n)*"
        else:
            literal = ".*".join(map(re.escape, line.rstrip().split("...")))
            pattern += re.sub(r"(?:\\ ){2,}", " +", literal) + "\n"
    return re.fullmatch(pattern, output if output.endswith("\n") else f"{output}\n") is not None


@pytest.mark.parametrize(
    ("expected", "output", "right"),
    [
        (["one"], "one\n", True),
        (["one"], "one", True),
        (["one"], "two\n", False),
        (["one"], "one\ntwo\n", False),
        (["one", "two"], "one\n", False),
        (["a ... z"], "a b c z\n", True),
        (["a ... z"], "a b\nc z\n", False),
        (["...", "two"], "two\n", True),
        (["one", "  ...", "four"], "one\ntwo\nthree\nfour\n", True),
        (["one", "..."], "two\n", False),
        (["a.b"], "axb\n", False),
        (["a  b"], "a    b\n", True),
        (["a b"], "a  b\n", False),
    ],
)
def test_an_output_is_what_is_shown_or_not(expected: list[str], output: str, right: bool) -> None:
    assert shows(expected, output) is right


def test_a_block_is_taken_apart_into_commands_and_their_outputs() -> None:
    block = Block(1, "console", ["$ one", "out", "$ two \\", "  more", "$ three", "a", "b"])
    assert list(steps(block)) == [
        ("one", ["out"]),
        ("two \\\n  more", []),
        ("three", ["a", "b"]),
    ]


# (a) The examples


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in SECTIONED], ids=lambda page: page.name
)
def test_the_examples_of_a_page_do_what_they_show(page: Path, public_path: Path) -> None:
    if page.name == "survival.md":
        skips.require_resend()
    with sandbox(public_path, filled=page != README) as box:
        for block in blocks_in(page):
            where = f"{page.name}, the block of line {block.line}"
            if block.language == "console":
                for command, expected in steps(block):
                    status, output = box.run(command)
                    assert status == 0, f"{where}: $ {command}\nexit {status}\n{output}"
                    assert not expected or shows(expected, output), (
                        f"{where}: $ {command}\nprinted:\n{output}"
                    )
            elif block.language == "python":
                status, output = box.run_python(block.text)
                assert status == 0, f"{where}: {output}"
        box.assert_clean()


def test_the_example_of_the_package_itself_runs(public_path: Path) -> None:
    code = inspect.cleandoc(diffmergefs.__doc__ or "").split("::\n", 1)[1].split("\nNothing", 1)[0]
    with sandbox(public_path) as box:
        assert box.run_python(inspect.cleandoc(code)) == (0, "")
        assert (box.work / "whole.mem").stat().st_size == SIZE


def help_examples() -> list[tuple[str, str]]:
    """Each example in a --help, with its verb."""
    found = []
    for name, command in {"": cli.cli, **VERBS}.items():
        text = inspect.cleandoc(command.help or "")
        examples = re.search(r"^Examples?:\n((?:  .*(?:\n|$))+)", text, re.MULTILINE)
        assert examples, f"--help of {name or 'diffmergefs'} has no example"
        found += [(name, line.strip()) for line in examples[1].splitlines()]
    return found


@pytest.mark.parametrize(("verb", "example"), help_examples())
def test_the_examples_of_a_help_work(verb: str, example: str, public_path: Path) -> None:
    with sandbox(public_path) as box:
        if verb in ("umount", "status"):
            assert box.run("diffmergefs mount /srv/snapshots /mnt/views")[0] == 0
        status, output = box.run(example)
        # Nothing is recorded in the sandbox: the answer is 'no'.
        assert status == (1 if "--show" in example else 0), output
        if " mount " in example:
            assert box.run(f"diffmergefs umount {example.split()[-1]}") == (0, "")
        if verb == "uffd":
            pid = f"$(diffmergefs status --json {example.split()[-1]} | jq .pid)"
            assert box.run(f"kill {pid}")[0] == 0
        if verb == "status":
            assert box.run("diffmergefs umount /mnt/views") == (0, "")
        box.assert_clean()


def not_run() -> list[tuple[Path, Block]]:
    run = ("console", "python", "json", "text")
    return [(p, b) for p in PAGES for b in blocks_in(p) if b.language not in run]


def test_each_block_that_is_not_run_is_listed_with_its_reason() -> None:
    found = set()
    for page, block in not_run():
        key = [(name, s) for name, s in NOT_RUN if name == page.name and s in block.text]
        assert len(key) == 1, f"{page.name}, line {block.line}: not run, and {key} in NOT_RUN"
        found.add(key[0])
    assert found == set(NOT_RUN), "a reason for a block that is no more"


def the_block(page: Path, part: str) -> Block:
    (found,) = [block for where, block in not_run() if where == page and part in block.text]
    return found


def test_pictures_hold_no_commands() -> None:
    for page in PAGES:
        for block in blocks_in(page, "text"):
            assert not [line for line in block.lines if line.startswith("$ ")], page


def test_json_in_the_docs_parses() -> None:
    for page in PAGES:
        for block in blocks_in(page, "json"):
            try:
                json.loads(block.text)
            except ValueError:
                for line in block.lines:
                    json.loads(line)


def test_the_packages_to_install_are_those_of_the_makefile() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    needed = re.search(r"^RUN_PACKAGES := (.*)$", makefile, re.MULTILINE)
    assert needed is not None
    shown = set(the_block(DOCS / "install.md", "apt-get install").text.split())
    # libc6-dev comes with gcc.
    assert set(needed[1].split()) - {"libc6-dev"} <= shown
    assert {"python3-dev", "python3-venv"} <= shown


def test_what_readme_asks_of_firecracker(public_path: Path) -> None:
    """The requests and fields of its API; and the files are those of the other examples."""
    with sandbox(public_path) as box:
        print_arguments = "import json, sys; print(json.dumps(sys.argv[1:]))"
        assert box.run(f"curl() {{ python3 -c '{print_arguments}' \"$@\"; }}") == (0, "")
        asked = []
        for part in ("/snapshot/create", "/snapshot/load"):
            status, output = box.run(the_block(README, part).text)
            assert status == 0, output
            for argv in map(json.loads, output.splitlines()):
                assert "--unix-socket" in argv
                (url,) = [word for word in argv if word.startswith("http://localhost/")]
                method, body = (argv[argv.index(name) + 1] for name in ("-X", "-d"))
                asked.append((method, url.removeprefix("http://localhost"), json.loads(body)))
        full = {"snapshot_path": "snapshot_file", "mem_file_path": "mem_file"}
        diff = {"snapshot_path": "snapshot_diff", "mem_file_path": "mem_diff"}
        load = {
            "snapshot_path": "snapshot_diff",
            "mem_backend": {"backend_type": "File", "backend_path": "views/mem_file"},
            "track_dirty_pages": True,
            "resume_vm": True,
        }
        assert asked == [
            ("PATCH", "/vm", {"state": "Paused"}),
            ("PUT", "/snapshot/create", {"snapshot_type": "Full"} | full),
            ("PATCH", "/vm", {"state": "Resumed"}),
            ("PATCH", "/vm", {"state": "Paused"}),
            ("PUT", "/snapshot/create", {"snapshot_type": "Diff"} | diff),
            ("PUT", "/snapshot/load", load),
        ]
        assert all((box.work / name).is_file() for name in (full | diff).values())
        mount = "diffmergefs mount --base mem_file --diff mem_diff views"
        assert mount in README.read_text(encoding="utf-8")
        assert box.run(f"mkdir views && {mount}") == (0, "")
        assert (box.work / "views/mem_file").stat().st_size == SIZE
        assert box.run("diffmergefs umount views") == (0, "")
        box.assert_clean()


def test_the_command_of_the_systemd_unit_is_one() -> None:
    # Not strict: a unit may have several lines EnvironmentFile=.
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DOCS / "diffmergefs@.service")
    program, verb, *arguments = shlex.split(unit["Service"]["ExecStart"])
    assert os.path.basename(program) == "diffmergefs"
    text = section(DOCS / "diffmergefs-mount.md", "AS A SERVICE")
    values = dict(re.findall(r"^([A-Z]+)=(.*)$", text, re.MULTILINE))
    given = [values[word.strip("${}")] if word[0] == "$" else word for word in arguments]
    # Parses them, and raises for what is wrong.
    context = click.Context(cli.cli, **cli.cli.context_settings)
    VERBS[verb].make_context(verb, given, parent=context)


# (b) Verbs and options


def section(page: Path, title: str) -> str:
    """The text of the section, without its heading, up to the next one of its level."""
    parts = re.split(r"^## (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[title]


def test_each_verb_has_a_page_and_each_page_a_verb() -> None:
    assert {page.name for page in DOCS.glob("diffmergefs*.md")} == set(MAN_PAGES)
    commands = section(DOCS / "diffmergefs.md", "COMMANDS")
    listed = re.findall(r"\[`([\w-]+)`\]\(diffmergefs-\1\.md\)", commands)
    assert sorted(listed) == sorted(VERBS)


@pytest.mark.parametrize("name", sorted(MAN_PAGES))
def test_a_page_has_the_sections_of_a_manual(name: str) -> None:
    text = (DOCS / name).read_text(encoding="utf-8")
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    wanted = ["NAME", "SYNOPSIS", "EXAMPLES", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "SEE ALSO"]
    assert [title for title in titles if title in wanted] == wanted
    assert text.startswith(f"# {name.removesuffix('.md')}\n")
    assert f"**{name.removesuffix('.md')}**" in section(DOCS / name, "NAME")


def options_of(command: click.Command) -> dict[str, bool]:
    """Each name of each option, and whether it takes a value."""
    context = click.Context(command, **cli.cli.context_settings)
    options = [p for p in command.get_params(context) if isinstance(p, click.Option)]
    return {
        name: not (option.is_flag or option.count or option.is_eager)
        for option in options
        for name in option.opts
    }


def option_entries(page: Path) -> Iterator[tuple[dict[str, bool], str]]:
    """The entries of OPTIONS: the names, whether they take a value, and the text."""
    for entry in re.split(r"^- ", section(page, "OPTIONS"), flags=re.MULTILINE)[1:]:
        head, _, text = entry.partition(": ")
        names = [name.partition(" ") for name in re.findall(r"`(-[^`]*)`", head)]
        yield {name: bool(value) for name, _, value in names}, text


def documented_options(page: Path) -> dict[str, bool]:
    return {name: value for names, _ in option_entries(page) for name, value in names.items()}


@pytest.mark.parametrize("name", sorted(MAN_PAGES))
def test_a_page_has_just_the_options_of_its_help(name: str) -> None:
    assert documented_options(DOCS / name) == options_of(MAN_PAGES[name])


@pytest.mark.parametrize("name", sorted(MAN_PAGES))
def test_a_page_gives_the_defaults_and_the_choices(name: str) -> None:
    entries = list(option_entries(DOCS / name))
    for option in MAN_PAGES[name].params:
        if not isinstance(option, click.Option) or option.is_flag:
            continue
        (text,) = [text for names, text in entries if option.opts[-1] in names]
        if option.show_default:
            known = option.default
            shown = known if isinstance(known, str) else f"{known:g}"
            assert f"Default: {shown}." in text, option.name
        if isinstance(option.type, click.Choice):
            assert all(f"`{choice}`" in text for choice in option.type.choices), option.name


@pytest.mark.parametrize("name", sorted(MAN_PAGES))
def test_a_synopsis_has_the_right_arguments(name: str) -> None:
    command = MAN_PAGES[name]
    (block,) = blocks_of(section(DOCS / name, "SYNOPSIS"))
    taking = options_of(command)
    arguments = set()
    for line in block.lines:
        words = line.removeprefix(name.removesuffix(".md").replace("-", " ", 1)).split()
        assert len(words) < len(line.split()), f"{line!r} does not begin with the command"
        plain = [word.strip("[].") for word in words]
        for before, word in zip(["", *plain], plain, strict=False):
            if word.startswith("-"):
                assert word in taking, word
            elif not taking.get(before, False) and word != "OPTION":
                arguments.add(word)
    wanted = {
        word.strip("[].")
        for param in command.params
        if isinstance(param, click.Argument)
        for words in (param.metavar or (param.name or "").upper()).split()
        for word in words.strip("[].").split("|")
    }
    if isinstance(command, click.Group):
        wanted = {"COMMAND", "ARGUMENT"}
    assert arguments == wanted


def test_the_mount_page_lists_the_refused_mount_options() -> None:
    text = section(DOCS / "diffmergefs-mount.md", "OPTIONS")
    (line,) = [line for line in text.splitlines() if "Refused:" in line]
    assert set(re.findall(r"`([a-z_]+)`", line.split("Refused:")[1])) == set(REFUSED)


HELPER_PAGE = DOCS / "mount.fuse.diffmergefs.md"


def test_the_page_of_the_mount_helper_is_that_of_the_program() -> None:
    assert documented_options(HELPER_PAGE) == options_of(helper.helper)
    statuses = re.findall(r"^- `(\d+)`", section(HELPER_PAGE, "EXIT STATUS"), re.MULTILINE)
    known = {helper.USAGE, helper.BUG, helper.INTERRUPTED, helper.FAILED}
    assert {int(status) for status in statuses} == known | {0}


def test_the_lines_of_fstab_are_understood() -> None:
    lines = [line.split() for block in blocks_in(HELPER_PAGE, "text") for line in block.lines]
    lines = [line for line in lines if len(line) == 6]
    assert len(lines) == 2
    for source, mountpoint, kind, options, _, _ in lines:
        assert helper.main([source, mountpoint, "-f", "-t", kind, "-o", options]) == 0


# (c) Exit codes, and other tables


def rows(page: Path, title: str) -> list[list[str]]:
    """The cells of the first table of a section, without its head."""
    lines = [line for line in section(page, title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def all_errors(
    family: type[errors.DiffMergeError] = errors.DiffMergeError,
) -> Iterator[type[errors.DiffMergeError]]:
    for child in family.__subclasses__():
        if child.__module__ == errors.__name__:
            yield child
            yield from all_errors(child)


def exit_codes() -> dict[str, str]:
    return {code: name.strip("`") for code, name, *_ in rows(DOCS / "exit-codes.md", "Codes")}


def test_the_table_of_exit_codes_is_that_of_the_code() -> None:
    codes = exit_codes()
    assert len(codes) == len(rows(DOCS / "exit-codes.md", "Codes")), "a code stands twice"
    family = {str(error.exit_code): error.__name__ for error in all_errors()}
    assert len(family) == len(list(all_errors())), "two classes have one code"
    plain = {"0": "-", "1": "-", str(cli.USAGE): "-", str(cli.BUG): "-", "128+n": "-"}
    assert codes == family | plain


@pytest.mark.parametrize("name", sorted(MAN_PAGES))
def test_the_exit_status_of_a_page_is_in_the_table(name: str) -> None:
    text = section(DOCS / name, "EXIT STATUS")
    listed = re.findall(r"^- `([^`]+)`", text, re.MULTILINE)
    assert "0" in listed and set(listed) <= set(exit_codes())
    assert "(exit-codes.md)" in text


def test_the_contract_has_each_check_of_a_diff() -> None:
    source = ast.parse(inspect.getsource(trust) + inspect.getsource(filled))
    checks = {
        argument.value
        for call in ast.walk(source)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
        for argument in call.args[:2]
        if call.func.id in ("problem", "problem_of") and isinstance(argument, ast.Constant)
    }
    title = "Which diffs are trusted"
    assert {row[0].strip("`") for row in rows(DOCS / "contract.md", title)} == checks | {"dense"}


def test_the_api_page_has_every_public_name() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^### `(\w+)", text, re.MULTILINE)) == set(diffmergefs.__all__)


def test_the_changelog_begins_with_what_is_unreleased_and_then_this_version() -> None:
    text = (DOCS / "changelog.md").read_text(encoding="utf-8")
    first, *versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert first == "Unreleased"
    assert versions[0].startswith(f"{diffmergefs.__version__} - ")
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - 20\d\d-\d\d-\d\d", line) for line in versions)


# (d) Links


def without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", without_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def test_each_page_is_linked_from_another() -> None:
    linked = {
        os.path.normpath(page.parent / target.partition("#")[0])
        for page in PAGES
        for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page))
    }
    assert {str(page) for page in PAGES if page != README} <= linked


# (e) The table of folders in the design


def test_the_design_names_every_folder_at_its_level() -> None:
    table = [
        (int(level), name.strip("`").rstrip("/"))
        for level, name, *_ in rows(DOCS / "design.md", "Folders")
    ]
    folders = [(level, folder) for folder, level in LEVEL.items() if folder != "diffmergefs"]
    assert sorted(table) == sorted(folders)


# (f) What README begins with


def test_the_first_commands_are_make_demo_and_make_test() -> None:
    first = next(b for b in blocks_in(README) if b.language != "text")
    assert [line.split("#")[0].strip() for line in first.lines] == ["make demo", "make test"]
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{name}:", makefile, re.MULTILINE) for name in ("demo", "test"))


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 250


def test_readme_says_which_command_one_needs() -> None:
    cells = [row[2] for row in rows(README, "Which command do I need?")]
    found = re.findall(r"docs/diffmergefs-(\w+)\.md", " ".join(cells))
    assert set(found) == VERBS.keys() - {"completion", "demo", "install-extras"}
