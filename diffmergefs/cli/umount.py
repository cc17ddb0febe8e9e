"""`umount`: unmount a view."""

from __future__ import annotations

import click

from diffmergefs.cli.options import MOUNTPOINT
from diffmergefs.system import mountpoint as mountpoints


@click.command()
@click.argument("mountpoint", type=MOUNTPOINT)
@click.option("--lazy", is_flag=True, help="Detach it even if files are open. They stay readable.")
def umount(mountpoint: str, lazy: bool) -> None:
    """Unmount MOUNTPOINT. Fail while files are open, unless you give --lazy.

    The error message names the processes that have files open or mapped, if they are visible.

    \b
    Example:
      diffmergefs umount /mnt/views
    """
    mountpoints.unmount(mountpoint, lazy=lazy)
