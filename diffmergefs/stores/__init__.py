"""A directory becomes snapshots and their chains."""
