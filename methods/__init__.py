"""Contrastive methods: encoders, heads, momentum encoder, key queue, losses. Independent of data and launch."""
