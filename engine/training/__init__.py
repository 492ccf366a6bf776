"""The training loop, and what it builds: model, data, step, run folder."""
