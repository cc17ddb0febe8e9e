"""What a map shows, page by page, and the subject of the map."""

from __future__ import annotations

from collections.abc import Iterable

from diffmergefs.analysis.info import MapEntry
from diffmergefs.pictures.maps import Subject
from tests.support.images import PAGE


def subject(pages: int, layers: int = 3, **changes: object) -> Subject:
    facts = {
        "title": "/srv/snapshots/pandas",
        "names": [f"layer{n}" for n in range(layers)],
        "size": pages * PAGE,
        "start": 0,
        "stop": pages * PAGE,
        "page": PAGE,
        "scanned": True,
    }
    return Subject(**(facts | changes))  # type: ignore[arg-type]


def tiled(pages: Iterable[int | str | None]) -> list[MapEntry]:
    """An entry for each page: of a layer, of none, or 'zeros' of the newest."""
    return [
        MapEntry(n * PAGE, (n + 1) * PAGE, 2 if isinstance(c, str) else c, not isinstance(c, int))
        for n, c in enumerate(pages)
    ]
