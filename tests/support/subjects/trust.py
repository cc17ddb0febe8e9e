"""Diffs and refusals of the tests of trust."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffmergefs.core.errors import UntrustedExtentsError
from diffmergefs.core.layer import Layer
from diffmergefs.opening.trust import TrustPolicy, override_lines, require_trust
from tests.support.images import PAGE, signed, write_layer

MIB = 1 << 20
SIZE = 16 * MIB


def diff(directory: Path, *pages: int, size: int = SIZE) -> Layer:
    extents = [(n * PAGE, signed(1, n * PAGE, PAGE)) for n in pages]
    return Layer.open(str(write_layer(directory / "diff", size, extents)))


def refusal(layer: Layer, policy: TrustPolicy | None = None) -> UntrustedExtentsError:
    with pytest.raises(UntrustedExtentsError) as caught:
        require_trust(layer, policy or TrustPolicy())
    error = caught.value
    assert str(error).startswith(f"{layer.path}: ") and "\n" not in str(error)
    return error


def require_overridable(layer: Layer, check: str) -> None:
    """The check refuses the layer, --trust-grain overrides it, and a line says so."""
    error = refusal(layer)
    assert error.check == check
    assert f"--trust-grain={check} " in str(error)
    for names in ({"all"}, {check}):
        found = require_trust(layer, TrustPolicy(trust_grain=names))
        assert override_lines(found) == [f"--trust-grain overrides the check of {check}: {error}"]
