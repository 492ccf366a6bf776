"""Two-view data paths: images to beton files, and beton files to augmented views on the device."""
