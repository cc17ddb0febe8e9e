"""Extents and the one merge rule: no store, no FUSE, no terminal."""
