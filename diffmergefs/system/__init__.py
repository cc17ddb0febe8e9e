"""What the operating system knows of mounts and daemons."""
