"""Mounts, daemons and service managers, as the operating system has them."""
