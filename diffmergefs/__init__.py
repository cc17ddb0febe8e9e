"""diffmergefs: VM snapshot chains (a full base and sparse diffs) as complete memory images.

For programs::

    import diffmergefs

    image = diffmergefs.open_chain("mem_file", ["mem_diff"])
    with image.view as view:
        view.size                      # bytes
        view.read(0x1000, 4096)        # merged bytes, exact or an error
        list(view.segments())          # who supplies what: (start, stop, layer number or None)
        diffmergefs.flatten(view, "whole.mem")

Nothing here needs libfuse; mounting is done by the command line.
"""

from diffmergefs.analysis.compare import Comparison, compare
from diffmergefs.core import __version__ as __version__
from diffmergefs.core.errors import DiffMergeError
from diffmergefs.core.extents import Extent, Segment
from diffmergefs.core.layer import Layer
from diffmergefs.core.view import MergedView
from diffmergefs.opening.images import Image, open_chain, open_image, open_side
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.writing.apply import apply_diff
from diffmergefs.writing.diffs import RediffResult, SquashResult, rediff, squash
from diffmergefs.writing.flatten import FlattenResult, flatten
from diffmergefs.writing.newdiff import WrittenDiff
from diffmergefs.writing.sealing import SealResult, seal_layer

__all__ = [
    "Comparison",
    "DiffMergeError",
    "Extent",
    "FlattenResult",
    "Image",
    "Layer",
    "MergedView",
    "RediffResult",
    "SealResult",
    "Segment",
    "SquashResult",
    "TrustPolicy",
    "WrittenDiff",
    "apply_diff",
    "compare",
    "flatten",
    "open_chain",
    "open_image",
    "open_side",
    "rediff",
    "seal_layer",
    "squash",
]
