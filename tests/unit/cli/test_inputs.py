"""The image that a user names: in one way and not in two, opened, with what is to be said of it."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from diffmergefs.cli.inputs import ImageArguments, image_options, require_one_source
from diffmergefs.core.errors import FileAccessError, UntrustedExtentsError
from diffmergefs.opening.trust import TrustPolicy
from tests.support.images import overlay_oracle
from tests.support.stores import BASE_PAGES, SIZE, pages, write_chain

IMAGE = overlay_oracle(SIZE, [pages(0, BASE_PAGES), pages(1, [1])])


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_chain(tmp_path / "store", ["base", "work"])


def given(*arguments: str) -> ImageArguments:
    """What a command with these options gets. Raises click.UsageError."""
    command = click.command()(image_options(lambda source: source))
    found = command.main(list(arguments), standalone_mode=False)
    assert isinstance(found, ImageArguments)
    return found


def test_an_image_is_a_snapshot_or_layers_in_their_order(store: Path) -> None:
    named = given(str(store / "work"), "--dense")
    assert named == ImageArguments(str(store / "work"), None, (), TrustPolicy(dense=True))
    base, diff = (str(store / tag / "memory.bin") for tag in ("base", "work"))
    layers = given("--diff", diff, "--base", base)
    assert layers == ImageArguments(None, base, (diff,), TrustPolicy())
    for source, title in ((named, f"{store}/work"), (layers, "memory.bin")):
        assert source.title == title
        with source.open().view as view:
            assert view.read(0, SIZE) == IMAGE


def test_a_title_is_printable() -> None:
    assert given("a\nb\udcff").title == "a\\nb\\xff"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "give either IMAGE or --base FILE [--diff FILE ...]"),
        (["image", "--base", "b"], "give either IMAGE or --base FILE, not both"),
        (
            ["d2", "--base", "b", "--diff", "d1"],
            "give either IMAGE or --base FILE, not both; if d2 is a diff, give one --diff for each",
        ),
        (["image", "--diff", "d"], "--diff needs --base"),
        (["--base", "b", "--allow-gaps"], "--allow-gaps goes with IMAGE, not with --base"),
        (["--base", "b", "--allow-outside", "/a"], "--allow-outside goes with IMAGE, not with"),
    ],
    ids=" ".join,
)
def test_it_is_named_in_one_way(arguments: list[str], text: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        given(*arguments)
    assert caught.value.message.startswith(text)


def test_a_message_has_the_name_that_the_verb_gives_its_source() -> None:
    with pytest.raises(click.UsageError, match="give either SOURCE or --base"):
        require_one_source(None, None, (), "SOURCE", TrustPolicy())


def test_checks_that_are_overridden_go_to_stderr(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "diffmergefs.opening.trust.untrusted_filesystem", lambda fd: "it is on exoticfs"
    )
    with pytest.raises(UntrustedExtentsError, match="exoticfs"):
        given(str(store / "work")).open()
    assert capsys.readouterr() == ("", "")
    given("--trust-grain=filesystem", str(store / "work")).open().view.close()
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("diffmergefs: --trust-grain overrides the check of filesystem: ")


def test_what_cannot_be_opened_is_an_error_of_its_own(tmp_path: Path) -> None:
    for arguments in ([str(tmp_path / "none")], ["--base", str(tmp_path / "none")]):
        with pytest.raises(FileAccessError, match="none: No such file"):
            given(*arguments).open()
