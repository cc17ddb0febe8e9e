"""The wheel's build: what is made of the sources and installed beside the package.

README and the pages of docs/, man pages of them, and the completion scripts. An editable
installation has none. README without links is the long description.
"""

from __future__ import annotations

import re
import runpy
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

_COMPLETIONS = {
    "bash": "share/bash-completion/completions/diffmergefs",
    "zsh": "share/zsh/site-functions/_diffmergefs",
    "fish": "share/fish/vendor_completions.d/diffmergefs.fish",
}


class Made(BuildHookInterface[Any]):
    """Adds the files that are made to the shared data of the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Make them, in a directory that `finalize` removes."""
        if version == "editable":
            return
        # Files for the prefix of an installation, as the format of wheels has them. (That hatchling
        # has a name of its own for them came later than what Debian 12 packages.)
        data = f"{self.metadata.name}-{self.metadata.version}.data/data"

        def include(file: Path, target: str) -> None:
            build_data["force_include"][str(file)] = f"{data}/{target}"

        root = Path(self.root)
        self._folder = tempfile.TemporaryDirectory(prefix="diffmergefs-wheel-")
        folder = Path(self._folder.name)
        docs = root / "docs"
        for page in (root / "README.md", *docs.iterdir(), *docs.glob("benchmarks/*")):
            name = page.relative_to(docs if page.is_relative_to(docs) else root)
            if page.suffix == ".md":
                # Installed, README lies beside the others.
                text = page.read_text(encoding="utf-8").replace("](docs/", "](")
                page = folder / page.name
                page.write_text(text.replace("](../README.md", "](README.md"), encoding="utf-8")
            if page.is_file():
                include(page, f"share/doc/diffmergefs/{name}")
        write_all = runpy.run_path(str(Path(__file__).with_name("manpages.py")))["write_all"]
        for page in write_all(root / "docs", folder, self.metadata.version):
            include(page, f"share/man/man{page.suffix[1:]}/{page.name}")
        # Not imported: the package needs more than its build.
        script = runpy.run_path(str(root / "diffmergefs" / "cli" / "completion.py"))["script"]
        for shell, target in _COMPLETIONS.items():
            path = folder / f"completion.{shell}"
            path.write_text(script(shell), encoding="utf-8")
            include(path, target)

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what went into the wheel."""
        if version != "editable":
            self._folder.cleanup()


class Metadata(MetadataHookInterface):
    """The long description, and the classifiers that hatchling 1.12.2 does not know yet."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the long description: README, without the links that lead nowhere elsewhere."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = re.sub(r"\[([^][]+)\]\((?!https?:)[^)\s]+\)", r"\1", text)
        text += "\nThe pages that this names are installed in `share/doc/diffmergefs`.\n"
        metadata["readme"] = {"content-type": "text/markdown", "text": text}

    def get_known_classifiers(self) -> list[str]:
        """The classifiers that every hatchling has to accept."""
        return ["Programming Language :: Python :: 3.13"]
