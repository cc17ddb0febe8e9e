"""Directories of snapshots: what is read there, and which chains it makes."""
