"""Opening a layer with the records beside it in force."""

from __future__ import annotations

from diffmergefs.core import beneath
from diffmergefs.core.layer import Layer
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.sidecars import presence, seal
from diffmergefs.sidecars.verified import Remembered


class Opener:
    """Opens layers, each with the records beside it in force, as `policy` says; for any threads.

    Records are a seal, and for a diff a presence file. With the policy's `no_seal` no seal is
    looked at. With `verify` 'pins' a record is compared with its file once, which is remembered;
    with 'full' each time that a layer is opened; with 'no' never.
    """

    def __init__(self, policy: TrustPolicy) -> None:
        self.policy = policy
        self._memory = Remembered(policy.state_dir)

    def open(
        self,
        path: str,
        root: beneath.Root | None = None,
        name: str | None = None,
        *,
        is_diff: bool = False,
    ) -> Layer:
        """`Layer.open`, and then the extents of the layer's records in place of the filesystem's.

        Blocks for the fsync and the walk, and where a record must be compared, for a read of all
        data. Raises SealError and PresenceError for a record that is not right or does not fit, and
        FileAccessError.
        """
        layer = Layer.open(path, root, name)
        is_checked, anew = self.policy.verify != "no", self.policy.verify == "full"
        if is_diff and (bits := presence.find(path, root, name)) is not None:
            presence.adopt(layer, bits)
            if is_checked:
                presence.compare_once(layer, bits, self._memory, anew=anew)
        if not self.policy.no_seal and (found := seal.find(path, root, name)) is not None:
            seal.adopt(layer, found, is_checked=is_checked)
            if is_checked:
                seal.compare_once(layer, found, self._memory, anew=anew)
        return layer
