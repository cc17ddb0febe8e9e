"""`umount`."""

from __future__ import annotations

import click

from diffmergefs.cli.options import MOUNTPOINT
from diffmergefs.system import mountpoint as mountpoints


@click.command()
@click.argument("mountpoint", type=MOUNTPOINT)
@click.option("--lazy", is_flag=True, help="Detach it although files are open; they stay served.")
def umount(mountpoint: str, lazy: bool) -> None:
    """Unmount MOUNTPOINT; refused while files are open, unless --lazy.

    The refusal names the processes that have them open or mapped, as far as they can be seen.

    \b
    Example:
      diffmergefs umount /mnt/views
    """
    mountpoints.unmount(mountpoint, lazy=lazy)
