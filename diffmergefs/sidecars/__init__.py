"""Sidecars whose extents override the filesystem's, and the memory of what was verified."""
