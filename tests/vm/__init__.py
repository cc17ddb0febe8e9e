"""Real input: the memory of a QEMU guest as a chain, and the guest restored from the mount."""
