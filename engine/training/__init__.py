"""The training loop and its parts: model, data, step, run folder."""
