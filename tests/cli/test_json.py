"""`--json`: each verb that prints facts has it, and its page names each field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from diffmergefs.cli.verbs import TABLE, load
from tests.support.commands import diffmergefs
from tests.support.images import write_layer
from tests.support.mounts import mounted
from tests.support.places import DOCS
from tests.support.stores import BASE_PAGES, SIZE, pages, write_chain

#: What each verb is called with, beside --json.
CALLS = {
    "apply": "apply {store}/work/memory.bin {own}",
    "compare": "compare --map {store}/base {store}/work",
    "demo": "demo",
    "doctor": "doctor {store}",
    "flatten": "flatten {store}/work -o {new}",
    "info": "info {store}/work",
    "list": "list {store}",
    "map": "map {store}/work",
    "prefetch": "prefetch --show {store}/work",
    "prefetch --forget": "prefetch --forget {store}/work",
    "rediff": "rediff {store}/base {store}/work -o {new}",
    "rediff --store": "rediff --store {store} -o {new}",
    "seal": "seal {store}/work/memory.bin",
    "squash": "squash {store}/work -o {new}",
    "status": "status",
    "verify": "verify {store}/work",
}
#: What prints no facts.
WITHOUT = {"mount", "umount", "uffd", "completion", "install-extras"}


def fields(found: object) -> Iterator[str]:
    """The names of all fields, at any depth."""
    if isinstance(found, dict):
        for name, value in found.items():
            yield name
            yield from fields(value)
    elif isinstance(found, list):
        for value in found:
            yield from fields(value)


def test_each_verb_has_it_or_prints_no_facts() -> None:
    having = {
        name
        for name in TABLE
        if (verb := load(name))
        for param in verb.params
        if isinstance(param, click.Option) and "--json" in param.opts
    }
    assert having == {call.split()[0] for call in CALLS}
    assert having | WITHOUT == set(TABLE)


@pytest.mark.parametrize("call", CALLS)
def test_the_page_names_each_field(call: str, public_path: Path, mountpoint: Path) -> None:
    store = write_chain(public_path / "store", ["base", "work"])
    own = write_layer(public_path / "own.mem", SIZE, pages(0, BASE_PAGES))
    words = CALLS[call].format(store=store, own=own, new=public_path / "new").split()
    with mounted(store, mountpoint):
        done = diffmergefs(*words, "--json")
    found = set(fields(json.loads(done.stdout)))
    page = (DOCS / f"diffmergefs-{call.split()[0]}.md").read_text(encoding="utf-8")
    assert found
    assert {name for name in found if f"`{name}`" not in page} == set()
