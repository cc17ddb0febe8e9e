"""Errors as one line."""

from __future__ import annotations

import errno
import os

import pytest

from diffmergefs.core.errors import BrokenChainError, FileAccessError, one_line


def test_errors_are_one_line_whatever_names_they_hold() -> None:
    text = str(BrokenChainError("a\nb\r\x00\x85\u2028\u2029é\udc80 c"))
    assert text == "a\\nb\\r\\x00\\x85\\u2028\\u2029é\udc80 c"
    assert one_line("naïve 名前") == "naïve 名前"


@pytest.mark.parametrize(
    ("reason", "step"),
    [
        (errno.ENOENT, "check its name"),
        (errno.EACCES, "use an account that has this permission, or change it"),
        (errno.ENOSPC, "write it where there is more space"),
        (errno.ENOTCONN, "unmount it: the daemon of this mount died"),
        (errno.EXDEV, "check that this user can read it and that its storage works"),
    ],
)
def test_the_remedy_of_a_refused_file_fits_the_reason(reason: int, step: str) -> None:
    assert FileAccessError(f"/a: b: {os.strerror(reason)}").remedy == step
    assert FileAccessError(f"/a: {os.strerror(reason)}; do that").remedy == "do that"


def test_the_remedy_for_a_directory_is_a_file() -> None:
    assert FileAccessError("/a: a directory, not a regular file").remedy == "name a file"
