"""What `verify` and `doctor` find."""
