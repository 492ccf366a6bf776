"""Sources of images: folders, archives, label lists, synthetic classes."""
