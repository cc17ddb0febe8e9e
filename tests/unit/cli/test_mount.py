"""`mount`: its options, also as mount options, and the request that is made of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

from diffmergefs.cli import mount as module
from diffmergefs.cli.logqueue import QueuedHandler
from diffmergefs.cli.mount import complete_options, mount
from diffmergefs.cli.start import Request
from diffmergefs.opening.trust import CHECKS, TrustPolicy
from diffmergefs.system.daemon import ADDRESS, JOURNAL, Notifier
from diffmergefs.system.tuning import Tuning


class Started(NamedTuple):
    """What `mount` would have served, and how; `notifier` is None in the background."""

    request: Request
    level: int
    notifier: Notifier | None
    timeout: float | None


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Started]:
    """All that was started from now on. Nothing is mounted."""
    found: list[Started] = []

    def in_front(request: Request, handler: QueuedHandler, level: int, notifier: Notifier) -> int:
        handler.close()
        found.append(Started(request, level, notifier, None))
        return 17

    def in_background(
        request: Request,
        handler: logging.Handler,
        level: int,
        timeout: float,
        kept: Collection[int],
    ) -> int:
        handler.close()
        found.append(Started(request, level, None, timeout))
        return 18

    monkeypatch.setattr(module, "serve_in_front", in_front)
    monkeypatch.setattr(module, "serve_in_background", in_background)
    monkeypatch.setattr(module, "is_journal", lambda fd, stream: False)
    monkeypatch.delenv(ADDRESS, raising=False)
    monkeypatch.delenv(JOURNAL, raising=False)
    return found


def run(*arguments: str) -> Any:
    return mount.main(list(arguments), standalone_mode=False)


def request(started: list[Started], *arguments: str) -> Request:
    """What is asked for with these options, for /store on /mnt."""
    assert run(*arguments, "-f", "/store", "/mnt") == 17
    return started.pop().request


# The request


def test_paths_become_absolute_and_all_else_has_a_default(
    started: list[Started], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("-f", "store", "mnt") == 17
    assert started.pop().request == Request(
        source=str(tmp_path / "store"),
        layers=(),
        mountpoint=str(tmp_path / "mnt"),
        policy=TrustPolicy(),
        layout=None,
        suffix=None,
        allow_other=False,
        open_rw=False,
        options=(),
        tuning=Tuning(),
        prefetch="notify",
        working_set_dir=None,
        drop_behind=False,
        fast_loop=True,
        watchdog=30,
    )


def test_layers_stand_in_their_order_for_a_source(
    started: list[Started], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("-f", "--base", "a", "--diff", "b", "--diff", "/c", "mnt") == 17
    found = started.pop().request
    assert (found.source, found.layers) == (None, (str(tmp_path / "a"), str(tmp_path / "b"), "/c"))
    assert found.name == str(tmp_path / "a")


def test_options_are_fields_of_the_request(started: list[Started]) -> None:
    found = request(
        started,
        *("--allow-other", "--open-rw", "--drop-behind", "--no-fast-loop", "--verify=full"),
        *("--layout=numbered", "--suffix=.img", "--readahead=64", "--max-background=9"),
        *("--working-set-dir=/sets", "--dense", "-o", "auto_unmount"),
    )
    assert found.allow_other and found.open_rw and found.drop_behind and not found.fast_loop
    assert (found.layout, found.suffix, found.working_set_dir) == ("numbered", ".img", "/sets")
    assert found.policy == TrustPolicy(dense=True, verify="full")
    assert found.tuning == Tuning(64, 9)
    assert found.options == ("auto_unmount",)


@pytest.mark.parametrize(
    ("options", "prefetch"),
    [
        ([], "notify"),
        (["--prefetch"], "notify"),
        (["--prefetch=fadvise"], "fadvise"),
        (["--prefetch=no"], "no"),
        (["--record"], "record"),
        (["--record", "--prefetch=no"], "record"),
    ],
)
def test_it_prefetches_or_records(
    options: list[str], prefetch: str, started: list[Started]
) -> None:
    found = request(started, *options)
    assert found.prefetch == prefetch
    assert found.tuning.recording == (prefetch == "record")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["a", "b", "c"], "give at most SOURCE and MOUNTPOINT"),
        ([], "MOUNTPOINT is missing"),
        (["mnt"], "MOUNTPOINT is missing"),
        (["--base", "x"], "MOUNTPOINT is missing"),
        (["--base", "x", "a", "b"], "give either SOURCE or --base FILE, not both"),
        (["--base", "x", "--diff", "y", "z", "b"], "if z is a diff, give one --diff for each file"),
        (["--base", "x", "--diff", "y", "z", "a", "b"], "give one --diff for each file"),
        (["--diff", "x", "a", "b"], "--diff needs --base"),
        (["--base", "x", "--allow-gaps", "mnt"], "--allow-gaps goes with SOURCE"),
        (["--record", "--prefetch", "a", "b"], "--record and --prefetch=notify cannot be comb"),
        (["-o", "record,prefetch=fadvise", "a", "b"], "--record and --prefetch=fadvise cannot"),
        (["-o", "page_size=7", "a", "b"], "7 is not a power of two"),
        (["-o", "allow_other=1", "a", "b"], "does not take a value"),
        (["-o", "layout=other", "a", "b"], "'other' is not one of"),
        (["-o", "noatime,rw", "a", "b"], "-o rw: a view is always read-only"),
        (["-o", "x=y", "a", "b"], "-o x=y: unknown option"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_wrong_use_starts_nothing(
    arguments: list[str], text: str, started: list[Started]
) -> None:
    with pytest.raises(click.UsageError) as caught:
        run(*arguments)
    assert text in caught.value.format_message()
    assert started == []


def test_it_serves_in_front_or_in_the_background_and_its_exit_code_is_returned(
    started: list[Started], tmp_path: Path
) -> None:
    log = f"--log={tmp_path / 'log'}"
    assert run("-f", "-v", log, "/store", "/mnt") == 17
    assert run(log, "--timeout=2.5", "/store", "/mnt") == 18
    front, background = started
    assert (front.level, front.timeout) == (logging.DEBUG, None)
    assert (background.level, background.timeout, background.notifier) == (logging.INFO, 2.5, None)


def test_no_child_inherits_what_a_service_manager_gave(
    started: list[Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ADDRESS, "@somewhere")
    monkeypatch.setenv(JOURNAL, "1:2")
    assert run("-f", "/store", "/mnt") == 17
    assert started[0].notifier
    assert ADDRESS not in os.environ and JOURNAL not in os.environ


# Mount options


def test_long_options_are_mount_options_and_others_go_to_the_kernel(
    started: list[Started],
) -> None:
    found = request(
        started, "-o", "ro,open_rw,page_size=16384,noatime", "-o", "allow-other,symfollow"
    )
    assert found.open_rw and found.allow_other
    assert found.policy == TrustPolicy(page_size=16384)
    assert found.options == ("noatime", "symfollow")


def test_an_option_may_be_repeated_in_both_forms(started: list[Started]) -> None:
    every = request(started, "--trust-grain").policy.trust_grain
    assert every == frozenset(CHECKS)
    assert every == request(started, "-o", "trust_grain").policy.trust_grain
    for arguments in (
        ("--trust-grain=grain", "--trust-grain=copy-up"),
        ("-o", "trust_grain=grain,trust_grain=copy-up"),
        ("-o", "trust-grain=grain\\,copy-up"),
        ("--trust-grain=grain", "-o", "ro,trust_grain=copy-up,dense"),
    ):
        assert request(started, *arguments).policy.trust_grain == {"grain", "copy-up"}


@pytest.mark.parametrize(
    ("begun", "offered"),
    [
        ("dense,trust", ["dense,trust_grain", "dense,trust_grain="]),
        ("no_fast", ["no_fast_loop"]),
        ("layou", ["layout="]),
        ("nothing", []),
    ],
)
def test_the_shell_is_offered_mount_options(begun: str, offered: list[str]) -> None:
    (option,) = (param for param in mount.params if param.name == "options")
    assert complete_options(click.Context(mount), option, begun) == offered
