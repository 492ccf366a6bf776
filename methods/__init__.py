"""Contrastive methods: encoders, heads, momentum copies, the key queue, losses. Knows no data, no launching."""
