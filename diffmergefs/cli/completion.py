"""`completion`: print a shell completion script."""

from __future__ import annotations

# The build of the wheel runs this file alone: import nothing of the package here.
import click
from click.shell_completion import get_completion_class

#: The supported shells.
SHELLS = ["bash", "zsh", "fish"]


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print a script that makes SHELL (bash, zsh or fish) complete verbs, options and files.

    \b
    Examples:
      eval "$(diffmergefs completion bash)"
      diffmergefs completion zsh > _diffmergefs
      diffmergefs completion fish > diffmergefs.fish
    """
    print(script(shell), end="")


def script(shell: str) -> str:
    """The completion script for one of `SHELLS`. It calls `diffmergefs` for each completion."""
    kind = get_completion_class(shell)
    assert kind is not None
    made = kind(click.Group(), {}, "diffmergefs", "_DIFFMERGEFS_COMPLETE")
    # click's source() would run bash and print a warning about its version.
    return made.source_template % made.source_vars()
