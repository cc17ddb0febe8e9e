"""Names with a meaning of their own in every mount."""

#: In a mount's root the directory with what the mount says of itself, and so no tag's name.
STATUS_FOLDER = ".diffmergefs"
