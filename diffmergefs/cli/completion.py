"""`completion`: print a shell completion script."""

from __future__ import annotations

# The build of the wheel runs this file alone: import nothing of the package here.
import click
from click.shell_completion import get_completion_class

#: The supported shells.
SHELLS = ["bash", "zsh", "fish"]

# The end of the script for zsh. It is run once, or zsh loads it as a function and calls that for
# each tabulator. (click's own end completes nothing at the second, and before 8.1.4 at the first.)
_ZSH_END = """
if [[ $zsh_eval_context[-1] == (loadautofunc|shfunc) ]]; then
    %(complete_func)s "$@"
else
    compdef %(complete_func)s %(prog_name)s
fi
"""


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
    template = made.source_template
    if shell == "zsh":
        function, end, _ = template.rpartition("\n}\n")
        template = function + end + _ZSH_END
    # click's source() would run bash and print a warning about its version.
    return template % made.source_vars()
