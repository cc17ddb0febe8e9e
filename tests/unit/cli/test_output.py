"""What commands print: escapes, diagnostics, tables in a pipe, and progress without a terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from diffmergefs.cli.output import (
    print_diagnostic,
    print_json,
    print_table,
    printable,
    progress,
    sized,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("naïve 名前", "naïve 名前"),
        ("a\nb\x1b[2J\x7f", "a\\nb\\x1b[2J\\x7f"),
        ("a\u2028b\u2029c\x85", "a\\u2028b\\u2029c\\x85"),
        ("\udcff", "\\xff"),
        ("\ud800", "\\ud800"),
    ],
)
def test_what_is_unsafe_on_a_terminal_is_escaped(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_a_diagnostic_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    print_diagnostic("a\nb   c\x1b")
    assert capsys.readouterr() == ("", "diffmergefs: a\\nb c\\x1b\n")


def test_a_table_in_a_pipe_has_a_line_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 500
    print_table(["NAME", ">BYTES"], [("[bold]a\nb", 7), (long, None)])
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["NAME", "BYTES"]
    assert first.split() == ["[bold]a\\nb", "7"]
    assert second.split() == [long, "-"]
    assert len(head) == len(first) == len(second)


def test_a_narrow_terminal_folds_no_row(capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        *(sys.executable, "-c"),
        "from diffmergefs.cli.output import print_table\n"
        "print_table(['PATH', '=BYTES'], [('/a path/' + 'x' * 200, 4096)])",
    ]
    ours, theirs = os.openpty()
    done = subprocess.run(command, stdout=theirs, env=os.environ | {"COLUMNS": "40"}, timeout=60)
    os.close(theirs)
    text = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert done.returncode == 0
    assert text.splitlines()[1] == f"/a path/{'x' * 200}  4096 (4 KiB)"


@pytest.mark.parametrize(
    ("number", "word", "text"),
    [
        (0, "", "0"),
        (1, "bytes", "1 byte"),
        (1023, "bytes", "1023 bytes"),
        (1024, "", "1024 (1 KiB)"),
        (61440, "bytes", "61440 bytes (60 KiB)"),
        (3522560, "", "3522560 (3.36 MiB)"),
        (1 << 40, "", "1099511627776 (1 TiB)"),
    ],
)
def test_bytes_have_a_larger_unit_beside_them(number: int, word: str, text: str) -> None:
    assert sized(number, word) == text


def test_facts_are_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [1, None]})
    assert json.loads(capsys.readouterr().out) == {"a": [1, None]}


def test_without_a_terminal_no_bar_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("copy", 10) as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")
