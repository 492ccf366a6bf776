"""Contrastive methods: encoders, heads, momentum copies, the key queue, losses. Nothing here knows of data or launching."""
