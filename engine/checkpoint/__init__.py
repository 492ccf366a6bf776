"""Checkpoints: storage, compatibility, provenance."""
