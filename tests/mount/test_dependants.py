"""Mounts and processes that use a base which a diff is to be applied to."""

from __future__ import annotations

import json
import mmap
import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from diffmergefs import apply_diff, seal_layer
from diffmergefs.writing.apply import REASONS
from tests.support.commands import diffmergefs, diffmergefs_as_nobody, mistake
from tests.support.images import PAGE, overlay_oracle, write_layer
from tests.support.inputs import unchanged
from tests.support.mounts import mounted
from tests.support.stores import SIZE, pages, write_chain, write_document, write_tag
from tests.support.subjects.apply import BASE, MERGED, base_at, diff, reasons, refusal

__all__ = ["diff"]


def test_a_copy_of_ones_own_is_free(diff: Path, real_fs: Path) -> None:
    base = base_at(real_fs / "whole.mem")
    assert apply_diff(diff, base) == PAGE
    assert base.read_bytes() == MERGED


@pytest.mark.parametrize("how", ["r", "r+", "mapped"])
def test_whoever_has_it_open(diff: Path, real_fs: Path, how: str) -> None:
    base = base_at(real_fs / "whole.mem")
    with ExitStack() as stack:
        file = stack.enter_context(base.open("r+b" if how == "r+" else "rb", buffering=0))
        if how == "mapped":
            stack.enter_context(mmap.mmap(file.fileno(), SIZE, prot=mmap.PROT_READ))
            file.close()
        assert "someone else has it open" in refusal(diff, base)
        assert reasons(diff, base) == ["open"]
    assert reasons(diff, base) == []


def test_a_layer_of_a_mounts_source(diff: Path, public_path: Path, mountpoint: Path) -> None:
    """Also one that lies outside of it, which nothing but the source's documents tell."""
    store, pool = public_path / "store", public_path / "pool"
    write_tag(store, "base")
    outside = base_at(pool / "far" / "away.mem")
    write_document(store, "base", json.dumps({"memory": str(outside)}))
    (store / "base" / "memory.bin").unlink()
    free = base_at(public_path / "own" / "whole.mem")
    assert reasons(diff, outside) == []
    with mounted(store, mountpoint, f"--allow-outside={pool}"):
        text = refusal(diff, outside)
        assert f"the mount on {mountpoint} shows it as the layer of 'base' (mounted)" in text
        assert reasons(diff, free) == []


def test_an_explicit_base_that_is_mounted(diff: Path, public_path: Path, mountpoint: Path) -> None:
    base = base_at(public_path / "mem,file")
    with mounted(None, mountpoint, "--base", str(base)):
        assert reasons(diff, base) == ["open", "mounted"]
    assert reasons(diff, base) == []


def test_a_mount_that_hangs_is_not_asked(diff: Path, public_path: Path, mountpoint: Path) -> None:
    """Neither where it is mounted beside the file, nor where another's source lies in it."""
    store = write_chain(public_path / "store", ["base", "work"])
    beside = base_at(public_path / "whole.mem")
    deeper = base_at(public_path / "own" / "whole.mem")
    (public_path / "inner").mkdir()
    with ExitStack() as stack:
        outer = stack.enter_context(mounted(store, mountpoint))
        image = mountpoint / "work" / "memory.bin"
        stack.enter_context(mounted(None, public_path / "inner", f"--base={image}"))
        stack.enter_context(outer.stopped())
        for base in (beside, deeper, store / "base" / "memory.bin"):
            done = diffmergefs("apply", diff, base)
            assert done.returncode == (8 if "store" in str(base) else 0), done
    assert done.stderr.endswith("--force=layer,open,mounted\n")


def test_all_reasons_at_once_and_each_overridden_by_its_name(
    public_path: Path, mountpoint: Path
) -> None:
    store = write_chain(public_path / "store", ["base", "work"])
    base = store / "base" / "memory.bin"
    diff = write_layer(public_path / "diff", SIZE, pages(1, range(14)))
    os.link(base, public_path / "other")
    seal_layer(base)
    # The mount may see what `apply` did before it ends.
    seen = "parent replaced"
    with mounted(store, mountpoint, expect_log=(seen,)), base.open("rb"):
        with unchanged([base]):
            line = mistake(8, "apply", diff, base)
            assert line.endswith(f"--force={','.join(REASONS)}\n")
            assert all(f" ({name})" in line for name in REASONS)
            line = mistake(8, "apply", diff, base, "--force=links,sealed,mounted")
            assert line.endswith("--force=layer,open,order\n")
        done = diffmergefs("apply", diff, base, f"--force={','.join(REASONS)}")
        assert (done.returncode, done.stdout) == (0, f"{14 * PAGE} bytes (56 KiB) copied\n")
    lines = done.stderr.splitlines()
    assert [line.partition(" overrides: ")[0] for line in lines] == [
        f"diffmergefs: --force={name}" for name in REASONS
    ]
    assert base.read_bytes() == overlay_oracle(SIZE, [BASE, pages(1, range(14))])


def test_what_is_another_users_cannot_be_told(diff: Path, public_path: Path) -> None:
    """Only the owner may ask for a lease."""
    base = base_at(public_path / "whole.mem")
    base.chmod(0o666)
    with base.open("rb"):
        done = diffmergefs_as_nobody("apply", diff, base)
    assert (done.returncode, done.stderr) == (0, "")
