"""Random chains for hypothesis: layers of signed pages, of written zeros, and of holes."""

from __future__ import annotations

from pathlib import Path

from hypothesis import strategies as st

from diffmergefs.core.layer import Layer
from diffmergefs.core.view import MergedView
from tests.support.images import PAGE, signed, write_layer

Extents = list[tuple[int, bytes]]


@st.composite
def chains(
    draw: st.DrawFn, least: int = 1, most: int = 5, pages: int = 12
) -> tuple[int, list[Extents]]:
    """A size, often no multiple of the page, and the extents of `least` to `most` layers."""
    size = draw(st.integers(1, pages * PAGE) | st.integers(1, pages).map(lambda n: n * PAGE))
    starts = range(0, size, PAGE)
    chain = []
    for layer in range(draw(st.integers(least, most))):
        kinds = draw(st.lists(st.sampled_from("..dz"), min_size=len(starts), max_size=len(starts)))
        extents: Extents = []
        for start, kind in zip(starts, kinds, strict=True):
            length = min(PAGE, size - start)
            if kind == "d":
                extents.append((start, signed(layer, start, length)))
            elif kind == "z":
                extents.append((start, bytes(length)))
        chain.append(extents)
    return size, chain


def write_chain(directory: Path, size: int, chain: list[Extents]) -> list[Path]:
    """The layers' files, `000.mem` and so on."""
    return [
        write_layer(directory / f"{n:03}.mem", size, extents) for n, extents in enumerate(chain)
    ]


def open_view(paths: list[Path]) -> MergedView:
    """The files as one chain, without a look at whether they can be trusted."""
    return MergedView([Layer.open(str(path)) for path in paths])
