"""Record and prefetch: the pages that a restore touches first."""
