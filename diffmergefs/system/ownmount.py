"""The mount that a daemon serves, wherever it was moved to since, and what else shows it."""

from __future__ import annotations

import os

from diffmergefs.core.errors import DiffMergeError
from diffmergefs.system import mountpoint as mountpoints
from diffmergefs.system import tuning
from diffmergefs.system.mountinfo import Mount
from diffmergefs.system.mounttable import MountTable, mounts


class OwnMount:
    """The mount that stood on its mountpoint, as `entry`, when it was made.

    Nothing that is asked reaches the mount itself: this process would have to answer.
    """

    def __init__(self, entry: Mount) -> None:
        self.device = entry.device
        self._number = entry.number
        self.source = entry.source

    def _is_it(self, entry: Mount) -> bool:
        return (entry.number, entry.device) == (self._number, self.device)

    def obstacle(self) -> str:
        """Why it cannot be detached now: what covers it. '' if nothing does, or it is gone."""
        try:
            table = MountTable()
        except (DiffMergeError, OSError) as error:
            return str(error)
        for entry in filter(self._is_it, table.entries):
            top = table.over(entry.path)
            if top is not None and not self._is_it(top):
                return f"{entry.path}: a {top.kind} on {top.path} covers it"
        return ""

    def detach(self) -> str:
        """Take it off, wherever it stands; '' if it is gone then, else what is in the way."""
        try:
            if obstacle := self.obstacle():
                return obstacle
            for entry in filter(self._is_it, mounts()):
                mountpoints.detach(entry.path)
        except (DiffMergeError, OSError) as error:
            return str(error)
        return ""

    def is_shown(self) -> bool:
        """Whether its filesystem is mounted anywhere, seen from here."""
        return bool(self._shown())

    def is_known(self) -> bool:
        """Whether the kernel has its connection still. False without fusectl."""
        return os.path.exists(tuning.connection(self.device))

    def elsewhere(self) -> list[str]:
        """Where the filesystem is mounted besides, seen from here: bind mounts, of one file too."""
        return [entry.path for entry in self._shown() if not self._is_it(entry)]

    def _shown(self) -> list[Mount]:
        try:
            # The kernel gives a free device number to the next mount, whose ever it is.
            mine = self.device, self.source
            return [entry for entry in mounts() if (entry.device, entry.source) == mine]
        except (DiffMergeError, OSError):
            return []  # /proc went away: nothing can be said
