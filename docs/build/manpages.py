"""Man pages of the pages in docs/ that have their form: run it with a directory to write them to.

The wheel's build does that (wheel.py beside this). markdown-it parses; here the blocks that the
pages use become macros of man(7). What is not known is an error, so that nothing goes missing.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode as Node

DOCS = Path(__file__).parent.parent
# What mount(8) runs is for administrators, all else is a command.
_SECTIONS = {"mount.fuse.diffmergefs": 8}


def pages(docs: Path) -> dict[str, int]:
    """The names of the pages in `docs` that become man pages, and their sections."""
    found = sorted(path.stem for path in docs.glob("diffmergefs*.md"))
    return {name: _SECTIONS.get(name, 1) for name in [*found, *_SECTIONS]}


def write_all(docs: Path, target: Path, version: str) -> list[Path]:
    """Write the man pages of `docs` into the directory `target`; the files, as NAME.SECTION."""
    known = pages(docs)
    written = []
    for name, number in known.items():
        path = docs / f"{name}.md"
        date = int(os.environ.get("SOURCE_DATE_EPOCH", path.stat().st_mtime))
        page = Page(name, known, time.strftime("%Y-%m-%d", time.gmtime(date)), version)
        written.append(target / f"{name}.{number}")
        written[-1].write_text(page.render(path.read_text(encoding="utf-8")), encoding="ascii")
    return written


class Page:
    """One page on its way from Markdown to man(7)."""

    def __init__(self, name: str, known: dict[str, int], date: str, version: str) -> None:
        self._name = name
        self._known = known
        self._head = (
            f'.TH "{_plain(name.upper())}" {known[name]} {date} "diffmergefs {version}" diffmergefs'
        )
        self._section = ""

    def render(self, text: str) -> str:
        """The page as roff, in ASCII. Raises ValueError for what this does not know."""
        root = Node(MarkdownIt("commonmark").enable("table").parse(text))
        lines = [self._head]
        for line in (line for node in root.children for line in self._block(node)):
            # A heading begins a paragraph.
            if line != ".PP" or not lines[-1].startswith((".SH ", ".SS ")):
                lines.append(line)
        return "\n".join(lines) + "\n"

    def _block(self, node: Node) -> Iterator[str]:
        match node.type:
            case "heading":
                yield from self._heading(node)
            case "paragraph":
                yield ".PP"
                yield from self._lines(node)
            case "fence" | "code_block":
                yield from (".PP", ".RS 4", ".EX", *_verbatim(node.content), ".EE", ".RE")
            case "bullet_list":
                for item in node.children:
                    yield from self._item(item, "\\(bu")
            case "ordered_list":
                for number, item in enumerate(node.children, int(node.attrs.get("start", 1))):
                    yield from self._item(item, f"{number}.")
            case "table":
                yield from self._table(node)
            case _:
                raise ValueError(f"{self._name}.md: man pages know no {node.type}")

    def _heading(self, node: Node) -> Iterator[str]:
        title = self._all(node.children[0], "R")
        if node.tag == "h2":
            self._section = title
            yield f'.SH "{title}"'
        elif node.tag != "h1":
            yield f'.SS "{title}"'

    def _item(self, item: Node, mark: str) -> Iterator[str]:
        first, *more = item.children
        lines = list(self._lines(first))
        # `- **word**: what it means` is an entry of a list of definitions.
        tag = re.match(r"(\\f[BI].*?\\fR(?:, \\f[BI].*?\\fR)*(?: \([^)]*\))?): ?(.*)", lines[0])
        if tag:
            yield from (".TP", tag[1], *([tag[2]] if tag[2] else []), *lines[1:])
        else:
            yield from (f".IP {mark} 4", *lines)
        if more:
            yield ".RS"
            for node in more:
                yield from self._block(node)
            yield ".RE"

    def _table(self, node: Node) -> Iterator[str]:
        # The first cell of a row is what the others are about.
        for row in (row for row in node.walk() if row.type == "tr" and row.children[0].tag == "td"):
            cells = [" ".join(self._lines(cell)) for cell in row.children]
            yield from (".TP", cells[0], "; ".join(cell for cell in cells[1:] if cell))

    def _lines(self, node: Node) -> Iterator[str]:
        text = "".join(self._inline(child) for part in node.children for child in part.children)
        if self._section == "NAME":
            # What whatis(1) reads.
            text = re.sub(r"\\f[BR]", "", text).replace(" - ", " \\- ")
        for line in text.split("\n"):
            if line.strip():
                yield _guarded(line.strip())

    def _inline(self, node: Node) -> str:
        match node.type:
            case "text":
                return _plain(node.content)
            case "code_inline":
                return f"\\fB{_code(node.content)}\\fR"
            case "strong":
                return f"\\fB{self._all(node, 'B')}\\fR"
            case "em":
                return f"\\fI{self._all(node, 'I')}\\fR"
            case "softbreak":
                return "\n"
            case "hardbreak":
                return "\n.br\n"
            case "image":
                return _plain(node.content)
            case "link":
                return self._link(node)
        raise ValueError(f"{self._name}.md: man pages know no {node.type}")

    def _all(self, node: Node, font: str) -> str:
        text = "".join(self._inline(child) for child in node.children)
        return text.replace("\\fR", f"\\f{font}")

    def _link(self, node: Node) -> str:
        # A page that is installed is named with its section; of others there is only the text.
        text = self._all(node, "R")
        target = str(node.attrs["href"]).partition("#")[0].removesuffix(".md")
        if re.match(r"https?:", target):
            return f"{text} ({_plain(str(node.attrs['href']))})"
        if target not in self._known or target == self._name:
            return text
        page = f"\\fB{_code(target)}\\fR({self._known[target]})"
        return page if text == _plain(target) else f"{text} ({page})"


def _plain(text: str) -> str:
    text = text.replace("\\", "\\e")
    return "".join(c if c.isascii() else f"\\[u{ord(c):04X}]" for c in text)


def _code(text: str) -> str:
    # To be copied: hyphens, quotes and carets as they are in a shell.
    signs = {"-": "\\-", "'": "\\(aq", "`": "\\(ga", "^": "\\(ha", "~": "\\(ti"}
    return "".join(signs.get(c, c) for c in _plain(text))


def _verbatim(text: str) -> Iterator[str]:
    for line in text.removesuffix("\n").split("\n"):
        yield _guarded(_code(line)) if line.strip() else ""


def _guarded(line: str) -> str:
    # A line that begins so would be a request.
    return f"\\&{line}" if line[0] in ".'" and not line.startswith(".br") else line


def _version() -> str:
    text = (DOCS.parent / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "(.*)"$', text, re.MULTILINE)
    assert found is not None
    return found[1]


if __name__ == "__main__":
    for written in write_all(DOCS, Path(sys.argv[1]), _version()):
        print(written)
