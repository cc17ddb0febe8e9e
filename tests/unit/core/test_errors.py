"""Errors as one line."""

from __future__ import annotations

from diffmergefs.core.errors import BrokenChainError, one_line


def test_errors_are_one_line_whatever_names_they_hold() -> None:
    text = str(BrokenChainError("a\nb\r\x00\x85\u2028\u2029é\udc80 c"))
    assert text == "a\\nb\\r\\x00\\x85\\u2028\\u2029é\udc80 c"
    assert one_line("naïve 名前") == "naïve 名前"
