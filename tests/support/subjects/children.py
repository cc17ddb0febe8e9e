"""A directory of modules that must not be imported."""

from __future__ import annotations

from pathlib import Path

MODULES = ("trio", "pyfuse3", "click", "json", "runpy", "subprocess", "sitecustomize")


def plant(folder: Path) -> Path:
    """A directory full of modules that leave a trace when they are run; the trace."""
    ran = folder / "ran"
    code = f"open({str(ran)!r}, 'a').write(__name__ + '\\n')\nraise SystemExit(99)\n"
    folder.mkdir()
    for name in MODULES:
        (folder / f"{name}.py").write_text(code)
    (folder / "diffmergefs").mkdir()
    for name in ("__init__", "__main__"):
        (folder / "diffmergefs" / f"{name}.py").write_text(code)
    return ran
