"""Settings of a run, and the command line and recipes that give them."""
