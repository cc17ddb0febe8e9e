"""Records beside a layer whose extents override the filesystem's, and what was verified."""
