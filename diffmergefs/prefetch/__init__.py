"""An observer of the mount that records working sets and prefetches them."""
