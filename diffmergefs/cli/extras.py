"""`install-extras`: link what pip installed to where shells, man(1), mount(8) and systemd look."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

import click

from diffmergefs.cli.helper import NAME as HELPER
from diffmergefs.cli.options import DIRECTORY
from diffmergefs.cli.output import print_diagnostic, printable
from diffmergefs.cli.usage import Verb
from diffmergefs.core.errors import FileAccessError, OutputRefusedError
from diffmergefs.system import installation

_SBIN = Path("/sbin")
_UNITS = Path("/usr/local/lib/systemd/system")
_UNIT = "diffmergefs@.service"
_ZSH = "share/zsh/site-functions"
# What is linked to the same place below the prefix.
_PLACE = re.compile(
    r"/(bin/diffmergefs|share/(?:man/man\d|bash-completion/completions|zsh/site-functions"
    r"|fish/vendor_completions\.d)/[^/]+)$"
)


@click.command("install-extras", cls=Verb)
@click.option(
    "--prefix",
    type=DIRECTORY,
    metavar="DIR",
    help="Link below DIR only. The default is ~/.local. For root it is /usr/local, and also the"
    " mount helper and the systemd unit are linked.",
)
@click.option("--uninstall", is_flag=True, help="Remove the links of this installation.")
def install_extras(prefix: str | None, uninstall: bool) -> None:
    """Link what pip installed to where the system looks: the command, man pages and completion.

    Run it as root to do so for all users, with the mount helper and the systemd unit. A file that
    is not a link to diffmergefs is never replaced.

    \b
    Examples:
      diffmergefs install-extras --prefix ~/.local
      diffmergefs install-extras --prefix ~/.local --uninstall
    """
    if installation.is_packaged():
        raise OutputRefusedError(
            "a package of the distribution has put everything in place; there is nothing to link"
        )
    files = installation.installed_files()
    if not files:
        raise FileAccessError("pip did not install diffmergefs; install it first")
    is_for_all = prefix is None and os.geteuid() == 0
    root = Path(prefix or ("/usr/local" if is_for_all else os.path.expanduser("~/.local")))
    wanted = links(files, root, is_for_all=is_for_all)
    if uninstall:
        for link in sorted(_present(wanted)):
            link.unlink()
            click.echo(printable(f"removed {link}"))
        return
    _refuse_others(wanted)
    for link in _present(wanted) - wanted.keys():
        link.unlink()  # of a file that an older version had
    _link(wanted)
    _advise(wanted, root, is_for_all=is_for_all)


def links(files: Iterable[Path], root: Path, *, is_for_all: bool) -> dict[Path, Path]:
    """Each link to make for these installed files, and the file that it leads to.

    They lie below `root`, and if they are for all users, also where mount(8) and systemd look.
    """
    found = dict[Path, Path]()
    for file in files:
        if place := _PLACE.search(str(file)):
            found[root / place[1]] = file
        elif is_for_all and file.name == HELPER:
            found[_SBIN / HELPER] = file
        elif is_for_all and file.name == _UNIT:
            found[_UNITS / _UNIT] = file
    # pip may have installed to `root` itself.
    return {link: file for link, file in found.items() if not _is_itself(link, file)}


def _is_itself(link: Path, file: Path) -> bool:
    return not link.is_symlink() and link.exists() and link.samefile(file)


def _present(links: Mapping[Path, Path]) -> set[Path]:
    # The existing links to this installation in the directories of `links`.
    folders = {file.parent for file in links.values()}
    found = {path for link in links for path in link.parent.glob("*diffmergefs*")}
    return {path for path in found if path.is_symlink() and path.readlink().parent in folders}


def _refuse_others(links: Mapping[Path, Path]) -> None:
    for link in links:
        # A link to a file of this name belongs to this or another installation.
        is_ours = link.is_symlink() and link.readlink().name == link.name
        if os.path.lexists(link) and not is_ours:
            raise OutputRefusedError(
                f"{link}: exists, and is not a link to diffmergefs; move it away, or name another"
                " directory with --prefix"
            )


def _link(links: Mapping[Path, Path]) -> None:
    before = os.umask(0o022)
    try:
        for link, file in sorted(links.items()):
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(file)
            click.echo(printable(f"{link} -> {file}"))
    finally:
        os.umask(before)


def _advise(links: Mapping[Path, Path], root: Path, *, is_for_all: bool) -> None:
    places = {str(link.parent.relative_to(root)) for link in links if link.is_relative_to(root)}
    is_in_path = str(root / "bin") in os.environ.get("PATH", "").split(os.pathsep)
    if "bin" in places and not is_for_all and not is_in_path:
        print_diagnostic(f"{root}/bin is not in your PATH; man(1) also needs it there")
    if places == {"bin"}:
        print_diagnostic(
            "an editable installation has no man pages and no completion scripts;"
            " see `diffmergefs completion --help`"
        )
    elif _ZSH in places and not is_for_all:
        print_diagnostic(
            "zsh finds its script after this line in ~/.zshrc, before compinit:"
            f" fpath+=({shlex.quote(f'{root}/{_ZSH}')})"
        )
    helper = links.get(_SBIN / HELPER)
    if helper is not None and (owner := helper.stat().st_uid) != 0:
        print_diagnostic(
            f"{helper}: belongs to user {owner}, whose code each mount will now run as root; an"
            " installation for all users should belong to root"
        )
