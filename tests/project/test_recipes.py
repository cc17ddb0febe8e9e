"""docs/recipes.md and docs/troubleshooting.md: each section is run by itself, as examples are.

A recipe begins with a line that says which test runs its commands, or why none does. A block of
text that a line with the name of a file and a colon introduces is written to that file.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from diffmergefs.fuse.status import METRICS_FILE, Metrics, rendered, status_of
from tests.project.test_docs import (
    SECTIONED,
    Block,
    Sandbox,
    blocks_of,
    rows,
    sandbox,
    shows,
    steps,
)
from tests.support import apt, skips
from tests.support.counters import NOTHING
from tests.support.places import DOCS, REPOSITORY

RECIPES = DOCS / "recipes.md"
HERE = str(Path(__file__).relative_to(REPOSITORY))
#: Directories that are the sandbox's own, beside those of every page.
OWN = ("etc", "var")


def sections(page: Path) -> dict[str, str]:
    """The text of each section of a page, by its title."""
    parts = re.split(r"^## (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(["", *parts[1::2]], parts[::2], strict=True))


RECIPE = sections(RECIPES)


def run_by(text: str) -> str | None:
    """The test file that a recipe names in its first line, or None for 'Not run'."""
    first = text.strip().partition("\n")[0]
    found = re.match(
        r"\*(Run by the tests: `(tests/\w+/\w+\.py)`|Not run (here|by the tests)\b)", first
    )
    assert found, first
    return found[2]


def written_files(text: str) -> Iterator[tuple[str, str]]:
    """The files that a section shows in blocks of text, by path."""
    yield from re.findall(r"`([\w./-]+)`[^`\n]*:\n\n```text\n(.*?)```", text, re.DOTALL)


def run(box: Sandbox, text: str) -> None:
    """Write the files of a section, and run its commands, which must print what it shows."""
    for path, content in written_files(text):
        file = box.work / box.inside(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(box.inside(content), encoding="utf-8")
    for block in blocks_of(text):
        if block.language == "console":
            run_block(box, block)
    box.assert_clean()


def run_block(box: Sandbox, block: Block) -> None:
    """Run the commands of a block; each must succeed and print what is shown."""
    for command, expected in steps(block):
        status, output = box.run(command)
        assert status == 0, f"$ {command}\nexit {status}\n{output}"
        assert not expected or shows(expected, output), f"$ {command}\nprinted:\n{output}"


@contextmanager
def sandbox_of_recipes(root: Path) -> Iterator[Sandbox]:
    with sandbox(root, OWN) as box:
        for folder in ("var/lib/prometheus/node-exporter", "var/log"):
            (root / folder).mkdir(parents=True)
        yield box


SECTIONS = [
    pytest.param(text, id=f"{name}-{title or 'intro'}")
    for name in sorted(SECTIONED)
    for title, text in sections(DOCS / name).items()
    if "```console" in text and (name != RECIPES.name or run_by(text) == HERE)
]


@pytest.mark.parametrize("text", SECTIONS)
def test_the_commands_of_a_section_do_what_they_show(text: str, public_path: Path) -> None:
    if "unshare --user" in text:
        skips.require_user_namespaces()
    if "kill -9 $server" in text:
        skips.require_resend()
    with sandbox_of_recipes(public_path) as box:
        run(box, text)


@pytest.mark.parametrize("title", [title for title in RECIPE if title])
def test_a_recipe_says_who_runs_its_commands(title: str) -> None:
    text = RECIPE[title]
    languages = {block.language for block in blocks_of(text)}
    file = run_by(text)
    if file is None:
        assert not languages & {"console", "python"}
    else:
        assert "console" in languages or file != HERE
        assert file == HERE or f'"{title}"' in (REPOSITORY / file).read_text(encoding="utf-8")


@contextmanager
def exported(directory: Path, unpacked: Path) -> Iterator[str]:
    """What node_exporter makes of the files in its textfile directory.

    If it is not installed, its package is unpacked into the directory `unpacked`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    name = "prometheus-node-exporter"
    program = shutil.which(name) or unpacked / "usr/bin" / name
    if not os.path.exists(program):
        # Not installed, because its package starts a service that everybody can reach.
        package = apt.with_lists(lambda: apt.download(unpacked, name))
        apt.run("dpkg-deb", "-x", str(package), str(unpacked))
    options = ["--collector.disable-defaults", "--collector.textfile"]
    options += [f"--collector.textfile.directory={directory}", f"--web.listen-address={address}"]
    exporter = subprocess.Popen([program, *options], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
                    yield answer.read().decode()
                return
            except OSError:
                assert exporter.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
    finally:
        exporter.kill()
        exporter.wait()


def test_node_exporter_reads_what_the_recipe_makes(public_path: Path, tmp_path: Path) -> None:
    with sandbox_of_recipes(public_path) as box:
        run(box, RECIPE["Prometheus and a dashboard"])
        folder = Path(box.inside("/var/lib/prometheus/node-exporter"))
        made = {line for line in (folder / "views.prom").read_text().splitlines() if line[0] != "#"}
        with exported(folder, tmp_path) as text:
            assert "node_textfile_scrape_error 0" in text.splitlines()
            names = {line.partition(" ")[0].partition("{")[0] for line in made}
            assert names == set(re.findall(r"^(diffmergefs_\w+)", text, re.MULTILINE))


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    known = rendered(METRICS_FILE, status_of(Metrics(), **NOTHING)).decode()
    for _, expressions in rows(RECIPES, "Prometheus and a dashboard"):
        for name in re.findall(r"diffmergefs_\w+", expressions):
            family = re.sub(r"_(bucket|count|sum)$", "", name)
            assert f"# TYPE {family} " in known, name


def test_cron_runs_the_command_that_was_tried() -> None:
    text = RECIPE["Prometheus and a dashboard"]
    ((_, line),) = written_files(text)
    (block,) = (block for block in blocks_of(text) if block.language == "console")
    assert line.split(None, 6)[6].strip() in {command for command, _ in steps(block)}


def test_a_mount_without_the_device_says_what_is_shown(public_path: Path) -> None:
    text = sections(DOCS / "troubleshooting.md")["No /dev/fuse"]
    (block,) = blocks_of(text)
    devices = "mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9"
    mount = "diffmergefs mount /srv/snapshots /mnt/views"
    with sandbox(public_path) as box:
        hidden = f"mount -t tmpfs none /dev && {devices} && {mount}"
        status, output = box.run(f"unshare --mount sh -c '{hidden}'")
        assert status == 11 and shows(block.lines, output), output
        box.assert_clean()
