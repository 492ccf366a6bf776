"""Images before they are written: folders, archives, label lists, synthetic classes."""
