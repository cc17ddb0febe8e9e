"""How this diffmergefs was installed: by pip, or by a package of the distribution."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

#: Where Debian's packages have their Python modules.
PACKAGED = "/usr/lib/python3/dist-packages"


def is_packaged() -> bool:
    """Whether a package of the distribution installed it, and not pip."""
    return __file__.startswith(f"{PACKAGED}/")


def install_command(module: str) -> str:
    """The command of a shell that installs the package of `module` for this interpreter.

    For pyfuse3, which pip builds from source, with a remark on what that needs.
    """
    if is_packaged():
        return f"apt install python3-{module.replace('_', '-')}"
    command = shlex.join([sys.executable, "-m", "pip", "install", module])
    if module == "pyfuse3":
        command += " (which needs gcc, pkg-config, and the headers of libfuse3 and Python)"
    return command


def missing_package(error: BaseException) -> str | None:
    """The package that this error says is not installed. None for modules of ours or Python's."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    package = error.name.partition(".")[0]
    return None if package in {*sys.stdlib_module_names, "diffmergefs"} else package


def installed_files() -> list[Path]:
    """The files that pip installed, without `..` in their paths; none if pip installed nothing.

    An editable installation has programs, and neither man pages nor completion scripts.
    """
    # Imported here, because every command imports this module, and that takes 10 ms.
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        found = distribution("diffmergefs")
    except PackageNotFoundError:
        return []
    return [Path(os.path.normpath(str(found.locate_file(f)))) for f in found.files or []]
