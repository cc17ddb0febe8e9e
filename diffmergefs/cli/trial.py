"""The act itself, for `doctor`: can a view be mounted here, and read?"""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

from diffmergefs.checks.finding import Finding
from diffmergefs.cli.throwaway import served
from diffmergefs.core.errors import DiffMergeError, FileAccessError
from diffmergefs.system.asking import ask

_CONTENT = bytes(range(256)) * 16
_APART = "from diffmergefs.system.namespace import enter_own; enter_own(); "
_REMEDY = (
    "mend what is said above of the kernel, the device and the helper; in a container, --device"
    " /dev/fuse and --cap-add SYS_ADMIN, and profiles of AppArmor and seccomp that let it mount"
)
_finding = partial(Finding, "host", "mount")


def try_mount() -> Finding:
    """Mount a view of one page for a moment, and read it: what came of it.

    In a temporary directory, and as root in a mount namespace that nobody else sees. Never raises.
    """
    try:
        folder = Path(os.path.realpath(tempfile.mkdtemp(prefix="diffmergefs-doctor-")))
    except OSError as error:
        return _finding(
            "warning",
            f"mounting could not be tried: {error}",
            "only what is said above tells whether something can be mounted",
            "run doctor where a temporary directory can be made",
        )
    try:
        found = _shown(folder)
    except (DiffMergeError, OSError) as error:
        return _no_mount(f"a view cannot be mounted: {error}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if found != _CONTENT:
        return _no_mount("a view was mounted, but does not show what it should")
    return _finding("fine", "a view was mounted and read")


def _no_mount(text: str) -> Finding:
    why = "nothing can be mounted here; flatten, info, verify and seal work all the same"
    return _finding("wrong", text, why, _REMEDY)


def _shown(folder: Path) -> bytes:
    base, view = folder / "base.mem", folder / "view"
    base.write_bytes(_CONTENT)
    view.mkdir()
    is_root = os.geteuid() == 0
    options = (f"--state-dir={folder / 'state'}", f"--base={base}", "--prefetch=no")
    with served(view, *options, before=_APART if is_root else "") as pid:
        # As root by the eyes of what serves it.
        file = Path(f"/proc/{pid}/root{view}" if is_root else view, base.name)
        try:
            return ask(file.read_bytes)
        except OSError as error:
            raise FileAccessError(f"{file}: {error}") from error
