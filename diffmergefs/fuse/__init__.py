"""The mount: a served directory as a FUSE filesystem."""
