"""What a wheel installs beside the package: man pages, completions, pages and the unit."""

from __future__ import annotations

import email
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from diffmergefs.cli.completion import SHELLS, script
from tests.support.places import DOCS, REPOSITORY

TOOL = runpy.run_path(str(REPOSITORY / "docs/build/manpages.py"))
PAGES = {f"{name}.{number}" for name, number in TOOL["pages"](DOCS).items()}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the wheel of this checkout is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-deps", "--no-index"]
    build = ["wheel", *offline, "--no-build-isolation", f"--wheel-dir={folder}", str(REPOSITORY)]
    environment = os.environ | {"TMPDIR": str(folder), "SOURCE_DATE_EPOCH": "1700000000"}
    subprocess.run([*pip, *build], check=True, timeout=100, env=environment)
    assert not list(folder.glob("diffmergefs-wheel-*")), "the build left its directory behind"
    (wheel,) = folder.glob("*.whl")
    install = ["install", *offline, "--ignore-installed", f"--prefix={folder}/prefix", str(wheel)]
    subprocess.run([*pip, *install], check=True, timeout=100)
    return folder / "prefix"


def page(prefix: Path, name: str) -> Path:
    return prefix / "share/man" / f"man{name[-1]}" / name


def rendered(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["man", *options, "--local-file", str(path)],
        env=os.environ | {"LC_ALL": "C.UTF-8", "MANWIDTH": "100", "MAN_KEEP_FORMATTING": ""},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )


def test_every_page_of_the_form_is_installed(prefix: Path) -> None:
    found = {path.name for path in (prefix / "share/man").rglob("*.[0-9]")}
    assert found == PAGES
    assert {"diffmergefs.1", "diffmergefs-mount.1", "mount.fuse.diffmergefs.8"} <= found
    for name in found:
        path = page(prefix, name)
        assert path.read_text(encoding="ascii").startswith(
            f'.TH "{name[:-2].upper()}" {name[-1]} 2023-11-14 "diffmergefs '
        )
        assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("name", sorted(PAGES))
def test_a_page_has_no_fault(prefix: Path, name: str) -> None:
    path = page(prefix, name)
    for command in (
        ["mandoc", "-T", "lint", "-W", "warning"],
        ["groff", "-man", "-ww", "-Tutf8", "-z"],
    ):
        done = subprocess.run([*command, path], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = rendered(path, "--warnings")
    assert done.stderr == ""
    whatis = subprocess.run(["lexgrog", path], capture_output=True, text=True, timeout=60)
    assert f'"{name[:-2]} - ' in whatis.stdout


@pytest.mark.parametrize("name", sorted(PAGES))
def test_a_page_says_what_its_source_says(prefix: Path, name: str) -> None:
    """All words of the text, in their order (apart from marks, links and where lines break)."""
    source = (DOCS / f"{name[:-2]}.md").read_text(encoding="utf-8")
    text = rendered(page(prefix, name), "--no-hyphenation").stdout
    text = "\n".join(text.splitlines()[1:-1])  # without the page's head and foot
    source = re.sub(r"\]\([^)]*\)", "", source.partition("\n")[2])
    source = re.sub(r"^\|.*\|\n\|(---\|)*$|^```\w*$", "", source, flags=re.MULTILINE)
    rest = iter(re.findall(r"\w+", text))
    assert [word for word in re.findall(r"\w+", source) if word not in rest] == []


def test_the_completion_scripts_are_installed(prefix: Path) -> None:
    places = {
        "bash": "share/bash-completion/completions/diffmergefs",
        "zsh": "share/zsh/site-functions/_diffmergefs",
        "fish": "share/fish/vendor_completions.d/diffmergefs.fish",
    }
    assert set(places) == set(SHELLS)
    for shell, place in places.items():
        assert (prefix / place).read_text(encoding="utf-8") == script(shell)
        assert place in (DOCS / "diffmergefs-completion.md").read_text(encoding="utf-8")


def test_pages_unit_and_programs_are_installed(prefix: Path) -> None:
    folder = prefix / "share/doc/diffmergefs"
    pages = {path.relative_to(DOCS) for path in DOCS.rglob("*") if path.is_file()}
    pages = {page for page in pages if page.parts[0] != "build"} | {Path("README.md")}
    assert {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} == pages
    unit = "diffmergefs@.service"
    assert (folder / unit).read_bytes() == (DOCS / unit).read_bytes()
    assert {path.name for path in (prefix / "bin").iterdir()} == {
        "diffmergefs",
        "mount.fuse.diffmergefs",
    }


def test_all_that_is_for_users_is_linked(prefix: Path, tmp_path: Path) -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    done = subprocess.run(
        [prefix / "bin/diffmergefs", "install-extras", f"--prefix={tmp_path}"],
        env=os.environ | {"PYTHONPATH": str(prefix / f"lib/python{version}/site-packages")},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done
    wanted = {str(path.relative_to(prefix)) for path in prefix.rglob("*") if path.is_file()}
    wanted = {name for name in wanted if not name.startswith(("lib/", "share/doc/"))}
    links = {path for path in tmp_path.rglob("*") if path.is_symlink()}
    assert all(path.resolve() == prefix / path.relative_to(tmp_path) for path in links)
    # The mount helper is linked elsewhere, and for all users only.
    found = {str(path.relative_to(tmp_path)) for path in links}
    assert found == wanted - {"bin/mount.fuse.diffmergefs"}
    manual = subprocess.run(
        ["man", f"--manpath={tmp_path}/share/man", "--where", "diffmergefs-mount"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    # man may name the link or where it leads to.
    assert Path(manual.stdout.strip()).resolve() == page(prefix, "diffmergefs-mount.1")


def test_installed_pages_link_to_each_other(prefix: Path) -> None:
    folder = prefix / "share/doc/diffmergefs"
    for path in folder.glob("*.md"):
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
            # What is outside of docs/, but README, is installed elsewhere or nowhere.
            if not target.startswith(("http", "../")) or "README" in target:
                assert (folder / target).exists(), f"{path.name}: {target}"


def test_the_long_description_is_readme_without_links(prefix: Path) -> None:
    (metadata,) = prefix.rglob("diffmergefs-*.dist-info/METADATA")
    found = email.message_from_bytes(metadata.read_bytes())
    assert found["Description-Content-Type"] == "text/markdown"
    text = str(found.get_payload())
    assert text.startswith("# diffmergefs\n") and "](" not in text
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert "[flatten](docs/diffmergefs-flatten.md)" in readme and "| flatten |" in text
    rest = iter(re.findall(r"\w+", text))
    words = re.findall(r"\w+", re.sub(r"\]\([^)]*\)", "", readme))
    assert [word for word in words if word not in rest] == []


def test_an_editable_installation_makes_nothing() -> None:
    made = runpy.run_path(str(REPOSITORY / "docs/build/wheel.py"))["Made"]
    hook = made(str(REPOSITORY), {}, None, None, "", "wheel")
    data: dict[str, Any] = {"shared_data": {}}
    before = set(os.listdir(tempfile.gettempdir()))
    hook.initialize("editable", data)
    hook.finalize("editable", data, "")
    assert data == {"shared_data": {}}
    new = set(os.listdir(tempfile.gettempdir())) - before
    assert not [name for name in new if name.startswith("diffmergefs-wheel-")]


def roff(text: str) -> list[str]:
    """A page of this Markdown, without its head."""
    known = {"diffmergefs-it": 1, "diffmergefs-mount": 1}
    made: list[str] = (
        TOOL["Page"]("diffmergefs-it", known, "2020-01-01", "1").render(text).splitlines()
    )
    assert made[0] == '.TH "DIFFMERGEFS-IT" 1 2020-01-01 "diffmergefs 1" diffmergefs'
    return made[1:]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# x\n\n## A B\n\nText.\n\nMore.", ['.SH "A B"', "Text.", ".PP", "More."]),
        ("### Sub\n\nText", ['.SS "Sub"', "Text"]),
        (".text\n'text\n\\text", [".PP", "\\&.text", "\\&'text", "\\etext"]),
        ("`-a 'b'` a-b", [".PP", "\\fB\\-a \\(aqb\\(aq\\fR a-b"]),
        ("**b** *i* é", [".PP", "\\fBb\\fR \\fIi\\fR \\[u00E9]"]),
        ("- `-a`, `--b C`: t\n  u", [".TP", "\\fB\\-a\\fR, \\fB\\-\\-b C\\fR", "t", "u"]),
        ("- a\n- b", [".IP \\(bu 4", "a", ".IP \\(bu 4", "b"]),
        ("2. a\n3. b", [".IP 2. 4", "a", ".IP 3. 4", "b"]),
        ("- a\n\n  b", [".IP \\(bu 4", "a", ".RS", ".PP", "b", ".RE"]),
        ("```\n.a\n\n-b\n```", [".PP", ".RS 4", ".EX", "\\&.a", "", "\\-b", ".EE", ".RE"]),
        ("|h|i|\n|-|-|\n|`a`|b|", [".TP", "\\fBa\\fR", "b"]),
        ("[x](diffmergefs-mount.md#y)", [".PP", "x (\\fBdiffmergefs\\-mount\\fR(1))"]),
        ("[diffmergefs-mount](diffmergefs-mount.md)", [".PP", "\\fBdiffmergefs\\-mount\\fR(1)"]),
        ("[x](contract.md) [y](diffmergefs-it.md#z)", [".PP", "x y"]),
        ("[x](https://a.b/c)", [".PP", "x (https://a.b/c)"]),
        ("## NAME\n\n**a-b** - c - d", ['.SH "NAME"', "a-b \\- c \\- d"]),
    ],
)
def test_markdown_becomes_macros(text: str, expected: list[str]) -> None:
    assert roff(text) == expected


@pytest.mark.parametrize("text", ["> quoted", "<b>html</b>", "---"])
def test_what_a_man_page_does_not_know_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"diffmergefs-it\.md: man pages know no "):
        roff(text)
