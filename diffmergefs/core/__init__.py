"""Extents, layers and the one merge rule: no store, no FUSE, no terminal."""

__version__ = "0.1.0"

#: The directory in a mount's root that holds the mount's own status; no tag may have this name.
STATUS_FOLDER = ".diffmergefs"
