"""What was found in the pages of layers, each over its parents, and remembered."""

from __future__ import annotations

import hashlib
import struct
import threading
import time
from collections.abc import Callable, Iterable

from diffmergefs.core.layer import Layer
from diffmergefs.core.singleflight import SingleFlight
from diffmergefs.sidecars.verified import MAX_REMEMBERED, Identity, Remembered

#: What a look has found, in numbers of its own; none if nothing.
Finding = tuple[int, ...]

_FORM = "1"  # of what is remembered: other rules, or other numbers, are another form
_NUMBERS = struct.Struct("=QQQqqQ")


class Parents:
    """The open layers below one, base first. It can be added to: so one goes up a chain."""

    def __init__(self, layers: Iterable[Layer] = ()) -> None:
        self.layers: list[Layer] = []
        self._digest = hashlib.sha256()
        for layer in layers:
            self.add(layer)

    def add(self, layer: Layer) -> None:
        self.layers.append(layer)
        self._digest.update(_identity(layer))

    def digest(self, layer: Layer, kind: str) -> str:
        """One for each content of these layers and of `layer` above them, and each `kind`."""
        digest = self._digest.copy()
        digest.update(_identity(layer) + f"{kind} {_FORM}".encode())
        return digest.hexdigest()


def _identity(layer: Layer) -> bytes:
    # The extents follow from these, but where it depends on the page cache what is data.
    status, records = layer.status, sorted(layer.records)
    numbers = _NUMBERS.pack(status.st_dev, status.st_ino, *layer.fingerprint)
    if len(layer.unwritten) or len(layer.unmapped):
        numbers += layer.extents.starts.tobytes() + layer.extents.stops.tobytes()
    return numbers + (repr(records).encode() if records else b"")


class Verdicts:
    """What the looks into layers have found, each once for a layer over the same parents.

    It is remembered in `memory` for later runs too, by the content of all these layers; `anew`
    believes nothing of that. Safe for several threads: what one of them looks into is waited for by
    the others.
    """

    def __init__(self, memory: Remembered, *, anew: bool = False) -> None:
        self._memory = memory
        self._anew = anew
        self._known: dict[str, Finding] = {}
        self._guard = threading.Lock()
        self._running: SingleFlight[Finding] = SingleFlight()

    def of(self, kind: str, parents: Parents, layer: Layer, look: Callable[[], Finding]) -> Finding:
        """What `look`, of this kind, finds in `layer` over `parents`; it is called if not known.

        Blocks for that, and raises what it raises.
        """
        chain = parents.digest(layer, kind)

        def recall_or_look() -> Finding:
            found = self._recall(kind, chain, layer)
            return self._look(kind, chain, layer, look) if found is None else found

        return self._running.do(chain, recall_or_look)

    def is_known(self, kind: str, parents: Parents, layer: Layer) -> bool:
        """Whether `of` would not have to look."""
        return self._recall(kind, parents.digest(layer, kind), layer) is not None

    def _recall(self, kind: str, chain: str, layer: Layer) -> Finding | None:
        with self._guard:
            known = self._known.get(chain)
        if known is not None or self._anew:
            return known
        value = self._memory.recall(kind, Identity.of_open(layer.fd)) or ""
        recorded, *numbers = value.split(" ")
        return self._keep(chain, tuple(map(int, numbers))) if recorded == chain else None

    def _look(self, kind: str, chain: str, layer: Layer, look: Callable[[], Finding]) -> Finding:
        since_ns, identity = time.time_ns(), Identity.of_open(layer.fd)
        found = look()
        self._memory.remember(kind, identity, " ".join(map(str, (chain, *found))), since_ns)
        return self._keep(chain, found)

    def _keep(self, chain: str, found: Finding) -> Finding:
        with self._guard:
            if len(self._known) >= MAX_REMEMBERED:
                del self._known[next(iter(self._known))]
            self._known[chain] = found
        return found
