"""New images and diffs, each whole under its name or not there."""
