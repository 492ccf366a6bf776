"""C libraries and the on-disk cache of compiled functions."""
