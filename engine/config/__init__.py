"""Settings of a run, their validation, and the command line and recipes that set them."""
