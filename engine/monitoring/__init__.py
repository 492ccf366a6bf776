"""Metrics of a run: embeddings, loss spikes, collapse, the log."""
