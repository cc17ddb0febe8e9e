"""The mount: a served directory as a FUSE filesystem, and what is around it."""
