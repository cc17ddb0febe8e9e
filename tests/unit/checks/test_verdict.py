"""What `verify` records of a failure: the kind of fault, and the line."""

from __future__ import annotations

import errno
import json

import pytest

from diffmergefs.checks.verdict import Fault, Faults, LayerVerdict, Verdict
from diffmergefs.core.errors import BrokenChainError, DiffMergeError, OutputRefusedError, SealError


def test_each_error_becomes_a_fault_of_its_kind_in_order() -> None:
    faults = Faults()
    faults.add(SealError("b.bmap: stale"))
    faults.add(BrokenChainError("no parent"))
    faults.add(OutputRefusedError("no kind of its own"))
    assert faults == [
        Fault("seal", "b.bmap: stale"),
        Fault("chain", "no parent"),
        Fault("other", "no kind of its own"),
    ]


def test_a_block_that_fails_is_a_fault_and_the_next_one_runs() -> None:
    faults = Faults()
    with faults.noted():
        raise SealError("a: wrong")
    with faults.noted("b"):
        raise OSError(errno.EIO, "Input/output error", "elsewhere")
    with faults.noted():
        raise OSError(errno.ENOENT, "No such file or directory", "c")
    with faults.noted("d"):
        pass
    assert faults == [
        Fault("seal", "a: wrong"),
        Fault("access", "b: Input/output error"),
        Fault("access", "c: No such file or directory"),
    ]


def test_a_bug_is_no_fault() -> None:
    faults = Faults()
    with pytest.raises(ZeroDivisionError), faults.noted():
        raise ZeroDivisionError
    assert not faults


@pytest.mark.parametrize("error", [DiffMergeError("x"), None])
def test_a_verdict_is_sound_without_a_fault_only(error: DiffMergeError | None) -> None:
    faults = Faults()
    if error:
        faults.add(error)
    layer = LayerVerdict("base", "/s/base", 4096, None, "verified")
    verdict = Verdict((layer,), tuple(faults), ("overridden",), ("hint",))
    assert verdict.sound == (error is None)
    assert json.loads(json.dumps(verdict.as_dict())) == {
        "sound": error is None,
        "layers": [
            {"tag": "base", "path": "/s/base", "size": 4096, "pin": None, "seal": "verified"}
        ],
        "faults": [{"kind": "other", "message": "x"}] if error else [],
        "overridden": ["overridden"],
        "hints": ["hint"],
    }
