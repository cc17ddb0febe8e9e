"""Pictures as files: refused before any work, whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffmergefs.cli.picture import picture_format, publish
from diffmergefs.core import errors
from diffmergefs.core.layer import Layer
from tests.support.images import PAGE, signed, write_layer


@pytest.fixture
def layer(tmp_path: Path) -> Layer:
    return Layer.open(str(write_layer(tmp_path / "base", 4 * PAGE, [(0, signed(0, 0, PAGE))])))


@pytest.mark.parametrize(
    ("path", "found"),
    [("a.png", "png"), ("a.SVG", "svg"), ("a.b/c", None), ("a.pdf", None), (".png", None)],
)
def test_the_end_of_the_name_says_the_format(path: str, found: str | None) -> None:
    assert picture_format(path) == found


def test_what_cannot_be_written_is_not_drawn(layer: Layer, tmp_path: Path) -> None:
    (tmp_path / "there.png").write_bytes(b"mine")

    def draw() -> bytes:
        raise AssertionError("drawn")

    with pytest.raises(errors.OutputRefusedError):
        publish(str(tmp_path / "there.png"), [layer], draw)
    with pytest.raises(errors.FileAccessError):
        publish(str(tmp_path / "no/such/new.png"), [layer], draw)


def test_what_fails_while_it_is_drawn_leaves_nothing(layer: Layer, tmp_path: Path) -> None:
    (tmp_path / "there.png").write_bytes(b"mine")

    def draw() -> bytes:
        raise errors.LayerChangedError("base: changed")

    for name, force in (("new.png", False), ("there.png", True)):
        with pytest.raises(errors.LayerChangedError):
            publish(str(tmp_path / name), [layer], draw, force=force)
    assert sorted(os.listdir(tmp_path)) == ["base", "there.png"]
    assert (tmp_path / "there.png").read_bytes() == b"mine"


@pytest.mark.parametrize(("modes", "mode"), [((0o644, 0o644), 0o644), ((0o644, 0o640), 0o640)])
def test_a_picture_is_for_those_who_may_read_all_layers(
    tmp_path: Path, modes: tuple[int, int], mode: int
) -> None:
    layers = []
    for number, bits in enumerate(modes):
        path = write_layer(tmp_path / str(number), PAGE, [])
        path.chmod(bits)
        layers.append(Layer.open(str(path)))
    publish(str(tmp_path / "new.png"), layers, lambda: b"drawn")
    assert (tmp_path / "new.png").stat().st_mode & 0o777 == mode
    assert (tmp_path / "new.png").read_bytes() == b"drawn"
